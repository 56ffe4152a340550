"""The algorithm in numpy float64, one module per stage, written from its formulas.

Nothing here imports the package under test, and nothing here is fast. Arrays are float64 except
for block lists, which are int64.
"""
