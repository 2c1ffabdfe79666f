"""The verb `emoe calibrate`: fits the cost model's constants to steps that are measured on this machine.

| file | owns |
|---|---|
| flags.py | the verb's flags |
| calibrate.py | the verb: placements, measurements, the fit, and the check on placements that were not fitted |
"""
