"""Imported last by a process that others are forked from: what it has imported, stays.

Else the garbage collector of each child walks a million objects again and again, which takes a
fifth of its time, and copies the pages they lie on.
"""

import gc

gc.collect()
gc.freeze()
