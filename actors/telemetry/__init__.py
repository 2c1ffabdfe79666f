"""Traces: what a request or an operation did, and when, for an OpenTelemetry collector. Off unless asked for.

spans        values, and the times of operations
exporting    sends spans; the one place that imports OpenTelemetry
"""
