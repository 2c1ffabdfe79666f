"""Measures steps of workers on this machine, without Ray and without a server.

| file | owns |
|---|---|
| prompts.py | the plans of steps that read prompts of random tokens |
| process.py | one worker's process: takes on placements, runs steps |
| group.py | the processes of one group, and what a step under a placement takes |
"""
