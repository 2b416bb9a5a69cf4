"""The open world (docs/WORLD.md): synthetic people, motions and cameras, a pure function of (seed, split).

People are in `subject`, motions in `expressions`, cameras in `cameras`. Nothing is imported here: the tracker needs the
names of expressions, and not the painters of people.
"""
