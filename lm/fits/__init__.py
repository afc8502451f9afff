"""Fits of laws to tables and curves, in float64 on the host.

table.py   a file -> columns, checked
select.py  the rows of a sweep that a law is fitted to: optima, near-optimal sets, best losses
solve.py   Huber regression of log residuals, many problems at once
fit.py     constants with intervals, rows left out, and constants that the data cannot separate
curves.py  the laws of whole loss curves (annealing, multi-power)
"""
