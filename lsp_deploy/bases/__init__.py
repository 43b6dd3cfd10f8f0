"""Hidden spaces in a basis of their own choice: the network computes the same, and its zeros cost less.

What happens between two linear layers is often blind to the basis: the neurons of an MLP may change places, q and k of
a head may be multiplied by any matrix and its inverse, so may v and the rows of proj, and the residual stream may be
rotated where only LayerNorms and linear layers look at it. Pruning is not blind to it: in the right basis the important
channels lie together, and whole blocks of what is left cost little.
"""
