"""The small operations of the core, by what they are for; all of them are counted."""

from __future__ import annotations

from benchmarks.scaling.small import Linear, Small

CORE = Small(Linear(5), Linear(21, tensor=16))
RECORDED = Small(Linear(2), Linear(17))
"""The norm of what the optimizer gets, as a metric."""
CUT = Small(Linear(4), Linear(32, tensor=37))
COPIES = Small(Linear(4), Linear(8, tensor=17))
"""Norms of copies left out of a sum."""
COPIED_UNITS = Small(Linear(4), Linear(8, vector=22, unit=44))
COPIED_VECTORS = Small(Linear(4), Linear(8, vector=22))
STAGES = Small(Linear(7), Linear(124))
TOTAL = Small(Linear(4), Linear(32))
"""A norm over stages, on top of one here."""
LOSS_RIDES = Small(Linear(6), Linear(72))
LOSS_SHARED = Small(Linear(1), Linear(12))
LOSS_ALONE = Small(Linear(5), Linear(60))
AMAXES = Small(Linear(1, tensor=3), Linear(tensor=36))
AMAXES_CUT = Small(Linear(7), Linear(8, tensor=48))
AMAXES_OF_UNITS = Small(Linear(tensor=1), Linear(vector=4, unit=4))
AMAXES_OF_ROWS = Small(Linear(matrix=1), Linear(unit=3))
"""Factors of the rows that are here."""
APPLIED = Small(Linear(5), Linear(25, tensor=16))
"""One factor on one value a tensor."""
APPLIED_TO_ONE = Small(Linear(5), Linear(42))
MULTIPLIED = Small(Linear(1), Linear(tensor=8))
"""A factor by one that waits."""
INVERTED = Small(Linear(1), Linear(8))
"""What a fused kernel is told."""
WRITTEN = Small(Linear(1), Linear(4))
AGAIN = Small(Linear(4), Linear(tensor=48))
"""Norms read again after elements changed."""
AGREED_AGAIN = Small(Linear(3), Linear(tensor=24))
ONE_NORM = Small(Linear(1), Linear(4, tensor=4))
SCALED_UNITS = Small(Linear(16), Linear(8, tensor=72, vector=118, unit=118))
"""Norms renewed from those of units and their factors."""
UNITS_LATER = Small(Linear(-2, tensor=6), Linear(2, tensor=10, vector=24, unit=24))
"""Unit norms asked for while a factor waits."""
