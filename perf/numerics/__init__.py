"""How exact a training step is: hard data, the float64 result, and what errors are allowed."""
