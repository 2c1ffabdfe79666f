"""Measures steps of a group of workers without a server.

| file | owns |
|---|---|
| prompts.py | the plans of steps that read prompts of random tokens |
| process.py | one worker, which takes on placements and runs steps, and its process |
| group.py | what a step of a group under a placement takes; the processes of a group on this machine |
"""
