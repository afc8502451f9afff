"""Fits of laws to tables and curves, in float64 on the host.

table.py   a file -> columns, checked
select.py  the rows of a sweep that speak for a law: optima, near-optimal sets, best losses
solve.py   Huber regression of log residuals, many problems at once
fit.py     constants with intervals, what is left out, what the data cannot tell apart
curves.py  the laws of whole loss curves (annealing, multi-power)
"""
