"""What import writes in another form before a graph becomes a Program: recurrent layers, complex numbers, control flow.

`edgec.importing.rewrite` is the entry.
"""
