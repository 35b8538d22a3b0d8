"""`sglang bench`: how fast the parts and the whole are, on this machine, beside what it could do and beside diffusers.

No torch here: what computes runs in `worker/`, in child processes, and pipelines run in the engine's own processes.
"""
