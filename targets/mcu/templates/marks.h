/*
 * Places in the code that the instruction counter knows: EDGEC_MARK(n) adds no instruction, only a line in a table that
 * is not loaded: address and n. Readings between marks start at each.
 */
#ifndef EDGEC_MARK
#define EDGEC_MARK(n) \
    __asm__ volatile("1:\n.pushsection .edgec_marks,\"\",%%progbits\n.4byte 1b, %c0\n.popsection" : : "i"(n) : "memory")
#endif
