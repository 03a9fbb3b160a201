"""How a call is measured: time, launches, memory; and the rows that come of it."""
