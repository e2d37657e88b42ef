/* Rows of the instruction table: see opcodes.h. */
