"""Around every call: who is admitted, errors as problems, and calls that another replica has to answer."""
