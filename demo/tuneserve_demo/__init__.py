"""The demo: what a user does with TuneServe, step by step, on this machine."""
