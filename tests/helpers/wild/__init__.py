"""The wild suite: modules that were written without our callbacks in mind, each under all of them.

Read in this order: ``zoo.py`` (what a module of the suite says of itself), ``reference.py`` (training written out,
without the package), ``cells.py`` (what is asserted of a module under a callback in a setting); then the families:
``language.py``, ``vision.py``, ``teachers.py``, ``data.py``, ``autograd.py``, ``training.py``.
"""
