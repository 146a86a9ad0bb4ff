"""Mutation testing for maintainers: wrong products of this package, and whether the suite notices them.

``make test-mutants`` runs the kept list ``plausible.yaml``; ``make test-mutants FILE=lightning_plugins/sid/losses.py``
a seeded sample of random mutants of one file or several, made by cosmic-ray's operators and by some that leave
something out (``operators.py``). Every mutant is written to a copy of the tree in a temporary folder; tests run there.
cosmic-ray's own runner is not used: it starts an interpreter for each mutant, which spends its time on imports.

Covering tests are found in two steps (``covering.py``): candidates are the file's doctests and the test files that are
named like it, name its module, or name a module which imports it, without tests marked ddp or slow; they run once,
unchanged, under a tracer that notes which test, or fixture of several tests, runs which line. A mutant is then judged
by the tests that run its line (``judge.py``), each in a fork of a process that has imported all libraries, until one
fails. Tests in processes of their own are not traced: what only they notice counts as a survivor.

``rates.json`` keeps the outcomes, ``docs/mutants.md`` is made of them, ``equivalent.yaml`` says which random mutants
change nothing that anyone could see, and why.
"""
