"""Runs: configuration, stage plan, depth-buffer transport, engine, train loop, metrics, monitor, command line."""
