"""What `import bitmill` offers: whole jobs and their parts as functions (docs/library.md).

They run the stages of `pipeline/` in the caller's process, one call at a time, and leave settings
of the process as they were.
"""
