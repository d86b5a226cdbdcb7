"""What a step costs under a placement: dispatch simulated, links timed, the prediction. Pure NumPy and numba."""
