"""Measures of models, each a function on arrays with its formula; who runs the models is `report/observe.py`."""
