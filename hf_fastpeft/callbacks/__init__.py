"""Trainer callbacks: what an adaptive-rank method has to do around the optimizer's step."""
