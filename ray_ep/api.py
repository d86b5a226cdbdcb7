"""Composition of driver and observers: `ray_ep.train`."""
