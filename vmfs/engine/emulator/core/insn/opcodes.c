/* The instruction table as data, and its handlers' names. */
#include "opcodes.h"

/* `operation_NAME` is defined by each row of the name: C makes one object of them (C11 6.9.2). */
#define ROW(name, map, opcode, prefix, length, w, digit, mod, o1, o2, o3, o4, size, handler, feature, attributes, fr, fw, fu) \
    struct operation operation_##name; \
    extern const struct emitter E_##name __attribute__((weak)); \
    extern const struct handlers H_##handler __attribute__((weak)); /* absent: #UD, and a test fails */
#include "opcodes.h"
#undef ROW

const struct opcode opcodes[] = {
#define ROW(name, map, opcode, prefix, length, w, digit, mod, o1, o2, o3, o4, size, handler, feature, attributes, fr, fw, fu) \
    {#name, #handler, #feature, &operation_##name, &H_##handler, &E_##name, map, opcode, prefix, mod, size, \
     FEATURE_##feature, length, w, digit, {o##o1, o##o2, o##o3, o##o4}, attributes, f##fr, f##fw, f##fu},
#include "opcodes.h"
#undef ROW
};
const unsigned opcode_count = sizeof opcodes / sizeof *opcodes;

const struct operand_type operand_types[] = {
#define X(name, kind, width) {kind, width},
    OPERANDS(X)
#undef X
};


bool core_instruction(unsigned index, struct core_instruction *row)
{
    static const char *const maps[] = {"", "0F", "0F38", "0F3A"};
    static const char *const prefixes[] = {"any", "none", "66", "F3", "F2", "no-rep"};
    static const char *const mods[] = {"rm", "reg", "mem", "reg0", "reg1", "reg2", "reg3", "reg4", "reg5", "reg6", "reg7"};
    static const char *const sizes[] = {"B", "W", "D", "Q", "V", "Y", "S", "N"};
    static const char *const lengths[] = {"", "L0", "L1", "LX", "LIG"};
    static const char *const ws[] = {"WX", "W0", "W1"};
    static const char *const operands[] = {
#define X(name, kind, width) #name,
        OPERANDS(X)
#undef X
    };
    if (index >= opcode_count)
        return false;
    const struct opcode *o = &opcodes[index];
    *row = (struct core_instruction){
        .name = o->name, .map = maps[o->map], .opcode = o->opcode, .prefix = prefixes[o->prefix], .digit = o->digit,
        .length = lengths[o->length], .w = o->length == LNONE ? "" : ws[o->w], .mod = mods[o->mod], .size = sizes[o->size], .handler = o->handlers ? o->handler_name : "", .feature = o->feature_name,
        .attributes = o->attributes, .flags_read = o->flags_read, .flags_written = o->flags_written,
        .flags_undefined = o->flags_undefined,
    };
    for (unsigned i = 0; i < OPERANDS_MAX; i++)
        row->operands[i] = o->operands[i] == o__ ? "" : operands[o->operands[i]];
    return true;
}

const char *core_attribute_name(unsigned bit)
{
    static const char *const names[] = {
#define X(name) #name,
        ATTRIBUTES(X)
#undef X
    };
    return bit < ATTRIBUTE_COUNT ? names[bit] + 2 : NULL;
}
