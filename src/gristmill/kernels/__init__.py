"""The heavy operations, each with a plain reference beside its fast path. Imports torch alone.

The reference on the CPU is the specification: every fast path is tested against it.
"""
