"""Run a module's training_step again without a trace, and what is computed so.

Read in this order: ``recorder.py`` (what is remembered, and how it is run again), ``window.py`` (the loss of one
optimizer step as a function of the parameters).
"""
