/* The instruction table as data, and its handlers' names. */
#include "opcodes.h"

#define INSN(name, map, opcode, prefix, digit, mod, o1, o2, o3, size, handler, feature, attributes, fr, fw, fu) \
    extern const struct handlers H_##handler __attribute__((weak)); /* absent: #UD, and a test fails */
#include "opcodes.h"
#undef INSN

const struct opcode opcodes[] = {
#define INSN(name, map, opcode, prefix, digit, mod, o1, o2, o3, size, handler, feature, attributes, fr, fw, fu) \
    {#name, #handler, #feature, &H_##handler, map, opcode, prefix, mod, size, FEATURE_##feature, digit, \
     {o##o1, o##o2, o##o3}, attributes, f##fr, f##fw, f##fu},
#include "opcodes.h"
#undef INSN
};
const unsigned opcode_count = sizeof opcodes / sizeof *opcodes;


bool core_instruction(unsigned index, struct core_instruction *row)
{
    static const char *const maps[] = {"", "0F", "0F38", "0F3A"};
    static const char *const prefixes[] = {"any", "none", "66", "F3", "F2", "no-rep"};
    static const char *const mods[] = {"rm", "reg", "mem", "reg0", "reg1", "reg2", "reg3", "reg4", "reg5", "reg6", "reg7"};
    static const char *const sizes[] = {"B", "W", "D", "Q", "V", "Y", "S", "N"};
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
        .mod = mods[o->mod], .size = sizes[o->size], .handler = o->handlers ? o->handler_name : "", .feature = o->feature_name,
        .attributes = o->attributes, .flags_read = o->flags_read, .flags_written = o->flags_written,
        .flags_undefined = o->flags_undefined,
    };
    for (unsigned i = 0; i < 3; i++)
        row->operands[i] = o->operands[i] == o__ ? "" : operands[o->operands[i]];
    row->operands[3] = "";
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
