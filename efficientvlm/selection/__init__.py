"""Which sentences of a pile say something visible: those that are near to an image in a teacher's space.

`rules.py` says what is kept, `pile.py` reads the sentences, `search.py` finds the images next to them, `candidates.py` holds what may
still be kept while they stream by.
"""
