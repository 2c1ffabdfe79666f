"""The verb `emoe calibrate`: fits the cost model's constants to steps that are measured on this machine
or on a cluster.

| file | owns |
|---|---|
| flags.py | the verb's flags |
| cluster_group.py | a group of workers on the nodes of a Ray cluster |
| calibrate.py | the verb: placements, measurements, the fit, and the check on placements that were not fitted |
"""
