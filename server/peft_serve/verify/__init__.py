"""`peft-serve adapters verify`: an adapter through peft and through the server, side by side.

The one place that imports peft, and no part of the serving path.
"""
