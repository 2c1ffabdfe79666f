"""Small operators of a trunk: recognised by what they compute on random input, and given native code in place."""
