"""What is asked of a placement when the subject of the traffic changes. Pure; it knows no problem and no planner.

scenarios   several subjects that a placement must serve, and how their prices become one
likeness    how unlike two counts of loads are, beyond chance
memory      the subjects that the traffic has had, within a bound of bytes
watch       notices that the subject has changed
"""
