/* A parser of a small configuration language, as a guest without an operating system: what examples/fuzz.py looks for bugs
 * in. `parse` is called with a text and its length, and gives the number of statements, or a negative error.
 *
 *     name = "text\n" ; a comment            values: texts, numbers (decimal, hex, with k, M or G), lists, tables,
 *     size = 4k + 2 * (3 - 1)                 expressions of numbers, references to names (@name) and to places (#3)
 *     list = [1, 2, [3, "x"]]
 *     part { inner = @size }
 *     if size > 10 { big = 1 } else { big = 0 }
 *
 * One bug is planted: it is not marked. */
typedef unsigned char u8;
typedef unsigned int u32;
typedef long long i64;

enum { NAMES = 64, NAME_MOST = 24, TEXT_ROOM = 4096, VALUES = 256, DEPTH_MOST = 12 };
enum error { OK, BAD_CHARACTER = -1, TOO_DEEP = -2, FULL = -3, NO_NAME = -4, BAD_NUMBER = -5, BAD_TEXT = -6, WRONG_TYPE = -7,
             DIVIDED_BY_ZERO = -8, UNEXPECTED = -9 };
enum type { NUMBER, TEXT, LIST, TABLE };

struct value {
    enum type type;
    i64 number;            /* TEXT: its offset in `texts`; LIST: the first of its values; TABLE: its depth */
    u32 length;
};

struct binding {
    char name[NAME_MOST];
    u32 length, depth;
    struct value value;
};

static struct binding names[NAMES];
static u32 name_count;
static char texts[TEXT_ROOM];
static u32 text_used;
static struct value values[VALUES];
static u32 value_count;
static u32 statements;

struct input {
    const u8 *at, *end;
    u32 depth;
    enum error error;
};

/* ---- Characters ---- */

static int is_letter(u8 c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
static int is_digit(u8 c) { return c >= '0' && c <= '9'; }
static int hex_digit(u8 c)
{
    if (is_digit(c))
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

static u8 peek(const struct input *in) { return in->at < in->end ? *in->at : 0; }

static int fail(struct input *in, enum error error)
{
    if (in->error == OK)
        in->error = error;
    in->at = in->end;
    return 0;
}

static void skip(struct input *in)
{
    for (;;) {
        u8 c = peek(in);
        if (c == ';') {
            while (in->at < in->end && *in->at != '\n')
                in->at++;
        } else if (c == ' ' || c == '\t' || c == '\n' || c == '\r') {
            in->at++;
        } else {
            return;
        }
    }
}

static int takes(struct input *in, u8 wanted)
{
    skip(in);
    if (peek(in) != wanted || in->at >= in->end)
        return 0;
    in->at++;
    return 1;
}

static int takes_two(struct input *in, u8 first, u8 second)
{
    skip(in);
    if (in->end - in->at < 2 || in->at[0] != first || in->at[1] != second)
        return 0;
    in->at += 2;
    return 1;
}

/* ---- Names ---- */

static int same(const char *a, const u8 *b, u32 length)
{
    for (u32 i = 0; i < length; i++)
        if ((u8)a[i] != b[i])
            return 0;
    return 1;
}

static u32 read_name(struct input *in, const u8 **begin)
{
    skip(in);
    *begin = in->at;
    if (!is_letter(peek(in)))
        return 0;
    while (is_letter(peek(in)) || is_digit(peek(in)))
        in->at++;
    return (u32)(in->at - *begin);
}

static struct binding *find(const u8 *name, u32 length)
{
    for (u32 i = name_count; i-- > 0;)
        if (names[i].length == length && same(names[i].name, name, length))
            return &names[i];
    return 0;
}

static int bind(struct input *in, const u8 *name, u32 length, const struct value *value)
{
    if (length >= NAME_MOST)
        return fail(in, NO_NAME);
    struct binding *b = find(name, length);
    if (!b || b->depth != in->depth) {
        if (name_count == NAMES)
            return fail(in, FULL);
        b = &names[name_count++];
        for (u32 i = 0; i < length; i++)
            b->name[i] = (char)name[i];
        b->name[length] = 0;
        b->length = length;
        b->depth = in->depth;
    }
    b->value = *value;
    statements++;
    return 1;
}

static void leave(struct input *in)
{
    while (name_count && names[name_count - 1].depth > in->depth)
        name_count--;
}

/* ---- Texts ---- */

static int put(struct input *in, u32 c)
{
    if (text_used >= TEXT_ROOM)
        return fail(in, FULL);
    texts[text_used++] = (char)c;
    return 1;
}

static int put_utf8(struct input *in, u32 c)
{
    if (c < 0x80)
        return put(in, c);
    if (c < 0x800)
        return put(in, 0xc0 | c >> 6) && put(in, 0x80 | (c & 0x3f));
    return put(in, 0xe0 | c >> 12) && put(in, 0x80 | (c >> 6 & 0x3f)) && put(in, 0x80 | (c & 0x3f));
}

static int read_hex(struct input *in, u32 digits, u32 *value)
{
    *value = 0;
    for (u32 i = 0; i < digits; i++) {
        int digit = hex_digit(peek(in));
        if (digit < 0)
            return fail(in, BAD_TEXT);
        *value = *value << 4 | (u32)digit;
        in->at++;
    }
    return 1;
}

static int read_escape(struct input *in)
{
    u32 c;
    u8 kind = peek(in);
    in->at++;
    switch (kind) {
    case 'n': return put(in, '\n');
    case 't': return put(in, '\t');
    case 'r': return put(in, '\r');
    case '0': return put(in, 0);
    case '"': case '\\': return put(in, kind);
    case 'x': return read_hex(in, 2, &c) && put(in, c);
    case 'u': return read_hex(in, 4, &c) && put_utf8(in, c);
    default: return fail(in, BAD_TEXT);
    }
}

static int read_text(struct input *in, struct value *value)
{
    *value = (struct value){TEXT, text_used, 0};
    in->at++;
    while (peek(in) != '"') {
        if (in->at >= in->end)
            return fail(in, BAD_TEXT);
        if (*in->at == '\\') {
            in->at++;
            if (in->at >= in->end || !read_escape(in))
                return fail(in, BAD_TEXT);
        } else if (*in->at < ' ') {
            return fail(in, BAD_TEXT);
        } else if (!put(in, *in->at++)) {
            return 0;
        }
    }
    in->at++;
    value->length = text_used - (u32)value->number;
    return 1;
}

/* ---- Numbers ---- */

static int read_digits(struct input *in, i64 *number)
{
    u32 base = 10, any = 0;
    *number = 0;
    if (peek(in) == '0' && in->end - in->at > 1 && (in->at[1] == 'x' || in->at[1] == 'X')) {
        base = 16;
        in->at += 2;
    }
    for (;; any = 1, in->at++) {
        int digit = hex_digit(peek(in));
        if (digit < 0 || (u32)digit >= base)
            break;
        if (*number > (0x7fffffffffffffffll - digit) / (i64)base)
            return fail(in, BAD_NUMBER);
        *number = *number * (i64)base + digit;
    }
    return any ? 1 : fail(in, BAD_NUMBER);
}

static int read_number(struct input *in, struct value *value)
{
    *value = (struct value){NUMBER, 0, 0};
    if (!read_digits(in, &value->number))
        return 0;
    u32 shift = peek(in) == 'k' ? 10 : peek(in) == 'M' ? 20 : peek(in) == 'G' ? 30 : 0;
    if (shift) {
        if (value->number >> (62 - shift))
            return fail(in, BAD_NUMBER);
        value->number <<= shift;
        in->at++;
    }
    return !is_letter(peek(in)) || fail(in, BAD_NUMBER);
}

/* ---- Values ---- */

static int read_expression(struct input *in, struct value *value);

static int read_list(struct input *in, struct value *value)
{
    struct value own[16];
    u32 count = 0;
    in->at++;
    if (++in->depth > DEPTH_MOST)
        return fail(in, TOO_DEEP);
    while (!takes(in, ']')) {
        if (count == sizeof own / sizeof *own)
            return fail(in, FULL);
        if (!read_expression(in, &own[count++]))
            return 0;
        if (!takes(in, ',')) {
            if (!takes(in, ']'))
                return fail(in, UNEXPECTED);
            break;
        }
    }
    in->depth--;
    if (value_count + count > VALUES)
        return fail(in, FULL);
    *value = (struct value){LIST, value_count, count};
    for (u32 i = 0; i < count; i++)
        values[value_count++] = own[i];
    return 1;
}

/* #N: a value that was in a list before, by its number; #-N: from the last one on. */
static int read_place(struct input *in, struct value *value)
{
    i64 number;
    in->at++;
    int from_end = takes(in, '-');
    if (!read_digits(in, &number))
        return 0;
    if (number >= (i64)value_count && !from_end)
        return fail(in, NO_NAME);
    int place = from_end ? (int)((i64)value_count - number) : (int)number;
    if (place >= (int)value_count)
        return fail(in, NO_NAME);
    *value = values[place];
    return 1;
}

static int read_reference(struct input *in, struct value *value)
{
    const u8 *name;
    in->at++;
    u32 length = read_name(in, &name);
    struct binding *b = length ? find(name, length) : 0;
    if (!b)
        return fail(in, NO_NAME);
    *value = b->value;
    if (takes(in, '[')) {
        struct value index;
        if (!read_expression(in, &index) || !takes(in, ']'))
            return fail(in, UNEXPECTED);
        if (index.type != NUMBER || index.number < 0)
            return fail(in, WRONG_TYPE);
        if (value->type == LIST) {
            if ((u32)index.number >= value->length)
                return fail(in, NO_NAME);
            *value = values[value->number + index.number];
        } else if (value->type == TEXT) {
            if (index.number >= value->length)
                return fail(in, NO_NAME);
            *value = (struct value){NUMBER, (u8)texts[value->number + index.number], 0};
        } else {
            return fail(in, WRONG_TYPE);
        }
    }
    return 1;
}

static int read_primary(struct input *in, struct value *value)
{
    skip(in);
    u8 c = peek(in);
    if (is_digit(c))
        return read_number(in, value);
    switch (c) {
    case '"': return read_text(in, value);
    case '[': return read_list(in, value);
    case '@': return read_reference(in, value);
    case '#': return read_place(in, value);
    case '-':
        in->at++;
        if (!read_primary(in, value))
            return 0;
        if (value->type != NUMBER)
            return fail(in, WRONG_TYPE);
        value->number = (i64)(0 - (unsigned long long)value->number);
        return 1;
    case '(':
        in->at++;
        if (++in->depth > DEPTH_MOST)
            return fail(in, TOO_DEEP);
        if (!read_expression(in, value))
            return 0;
        in->depth--;
        return takes(in, ')') || fail(in, UNEXPECTED);
    default:
        return fail(in, BAD_CHARACTER);
    }
}

static int both_numbers(struct input *in, const struct value *a, const struct value *b)
{
    return (a->type == NUMBER && b->type == NUMBER) || fail(in, WRONG_TYPE);
}

static int read_product(struct input *in, struct value *value)
{
    struct value right;
    if (!read_primary(in, value))
        return 0;
    for (;;) {
        u8 what = takes(in, '*') ? '*' : takes(in, '/') ? '/' : takes(in, '%') ? '%' : 0;
        if (!what)
            return 1;
        if (!read_primary(in, &right) || !both_numbers(in, value, &right))
            return 0;
        unsigned long long a = (unsigned long long)value->number, b = (unsigned long long)right.number;
        if (what != '*' && !b)
            return fail(in, DIVIDED_BY_ZERO);
        value->number = (i64)(what == '*' ? a * b : what == '/' ? a / b : a % b);
    }
}

static int join(struct input *in, struct value *value, const struct value *right)
{
    struct value joined = {TEXT, text_used, value->length + right->length};
    for (u32 i = 0; i < value->length; i++)
        if (!put(in, (u8)texts[value->number + i]))
            return 0;
    for (u32 i = 0; i < right->length; i++)
        if (!put(in, (u8)texts[right->number + i]))
            return 0;
    *value = joined;
    return 1;
}

static int read_sum(struct input *in, struct value *value)
{
    struct value right;
    if (!read_product(in, value))
        return 0;
    for (;;) {
        u8 what = takes(in, '+') ? '+' : takes(in, '-') ? '-' : 0;
        if (!what)
            return 1;
        if (!read_product(in, &right))
            return 0;
        if (what == '+' && value->type == TEXT && right.type == TEXT) {
            if (!join(in, value, &right))
                return 0;
            continue;
        }
        if (!both_numbers(in, value, &right))
            return 0;
        unsigned long long a = (unsigned long long)value->number, b = (unsigned long long)right.number;
        value->number = (i64)(what == '+' ? a + b : a - b);
    }
}

static int compare(const struct value *a, const struct value *b)
{
    if (a->type == NUMBER)
        return a->number < b->number ? -1 : a->number > b->number;
    for (u32 i = 0; i < a->length && i < b->length; i++)
        if (texts[a->number + i] != texts[b->number + i])
            return (u8)texts[a->number + i] < (u8)texts[b->number + i] ? -1 : 1;
    return a->length < b->length ? -1 : a->length > b->length;
}

static int read_expression(struct input *in, struct value *value)
{
    struct value right;
    if (!read_sum(in, value))
        return 0;
    u8 what = takes_two(in, '=', '=') ? '=' : takes_two(in, '!', '=') ? '!' : takes(in, '<') ? '<' : takes(in, '>') ? '>' : 0;
    if (!what)
        return 1;
    if (!read_sum(in, &right))
        return 0;
    if (value->type != right.type || value->type > TEXT)
        return fail(in, WRONG_TYPE);
    int order = compare(value, &right);
    i64 result = what == '=' ? !order : what == '!' ? !!order : what == '<' ? order < 0 : order > 0;
    *value = (struct value){NUMBER, result, 0};
    return 1;
}

/* ---- Statements ---- */

static int read_statements(struct input *in, int is_kept);

static int read_block(struct input *in, int is_kept)
{
    if (!takes(in, '{'))
        return fail(in, UNEXPECTED);
    if (++in->depth > DEPTH_MOST)
        return fail(in, TOO_DEEP);
    u32 before = statements;
    if (!read_statements(in, is_kept))
        return 0;
    if (!is_kept)
        statements = before;
    in->depth--;
    leave(in);
    return takes(in, '}') || fail(in, UNEXPECTED);
}

static int is_word(const u8 *name, u32 length, const char *word)
{
    u32 i = 0;
    while (word[i])
        i++;
    return i == length && same(word, name, length);
}

static int read_if(struct input *in, int is_kept)
{
    struct value condition;
    const u8 *name;
    if (!read_expression(in, &condition))
        return 0;
    int holds = condition.type == NUMBER ? condition.number != 0 : condition.length != 0;
    if (!read_block(in, is_kept && holds))
        return 0;
    const u8 *back = in->at;
    u32 length = read_name(in, &name);
    if (length && is_word(name, length, "else"))
        return read_block(in, is_kept && !holds);
    in->at = back;
    return 1;
}

static int read_statement(struct input *in, const u8 *name, u32 length, int is_kept)
{
    struct value value;
    if (is_word(name, length, "if"))
        return read_if(in, is_kept);
    skip(in);
    if (peek(in) == '{') {
        value = (struct value){TABLE, in->depth, 0};
        return (!is_kept || bind(in, name, length, &value)) && read_block(in, is_kept);
    }
    if (!takes(in, '='))
        return fail(in, UNEXPECTED);
    if (!read_expression(in, &value))
        return 0;
    return !is_kept || bind(in, name, length, &value);
}

static int read_statements(struct input *in, int is_kept)
{
    const u8 *name;
    for (;;) {
        skip(in);
        if (in->at >= in->end || peek(in) == '}')
            return in->error == OK;
        u32 length = read_name(in, &name);
        if (!length)
            return fail(in, BAD_CHARACTER);
        if (!read_statement(in, name, length, is_kept))
            return 0;
    }
}

int parse(const u8 *text, u32 length)
{
    struct input in = {text, text + length, 0, OK};
    name_count = text_used = value_count = statements = 0;
    if (read_statements(&in, 1) && in.at < in.end)
        fail(&in, UNEXPECTED);
    return in.error ? (int)in.error : (int)statements;
}
