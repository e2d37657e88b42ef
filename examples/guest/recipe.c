/* A parser of a small configuration language, as a guest without an operating system: what examples/fuzz.py looks for bugs
 * in. `parse` is called with a text and its length, and gives the number of statements, or a negative error.
 *
 *     name = "text\n" ; a comment            values: texts, numbers (decimal, hex, with k, M or G), lists, tables,
 *     size = 4k + 2 * (3 - 1)                 expressions of numbers, references to names (@name) and to places (#3)
 *     list = [1, 2, [3, "x"]]
 *     part { inner = @size }
 *     if @size > 10 and not @off { big = 1 } else { big = 0 }
 *     for one in [1, 2, 3] { last = @one }    the block, with each value
 *     rule twice(x) = @x * 2                  a rule, used as twice(4)
 *     port : number 1..65535 = 8080           what a value has to be
 *     when = 2026-11-30T14:05 + 1h30m         dates and durations are numbers of seconds
 *     from = 10.0.0.0/8                       an address is a list of two numbers: itself and its mask
 *     all = join(sort(["b", "a"]), ", ")      and other functions: see `functions`
 *
 * One bug is planted: it is not marked. */
typedef unsigned char u8;
typedef unsigned int u32;
typedef long long i64;

enum { NAMES = 64, NAME_MOST = 24, TEXT_ROOM = 4096, VALUES = 256, DEPTH_MOST = 12, LIST_MOST = 16, RULES = 16, PARAMETERS = 4,
       TURNS_MOST = 200, OUTPUT = 8192 };
enum error { OK, BAD_CHARACTER = -1, TOO_DEEP = -2, FULL = -3, NO_NAME = -4, BAD_NUMBER = -5, BAD_TEXT = -6, WRONG_TYPE = -7,
             DIVIDED_BY_ZERO = -8, UNEXPECTED = -9, TOO_LONG = -10, OUT_OF_RANGE = -11, BAD_DATE = -12, BAD_ADDRESS = -13 };
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
static u32 statements, turns;    /* turns: of loops, and uses of rules */

struct input {
    const u8 *at, *end;
    u32 depth;
    enum error error;
};

struct rule {
    char name[NAME_MOST];
    u32 length, count;
    struct parameter { const u8 *name; u32 length; } parameters[PARAMETERS];
    const u8 *body;             /* its expression, where it stands in the text */
};

static struct rule rules[RULES];
static u32 rule_count;
static char output[OUTPUT];
static u32 output_used;

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

static int is_word(const u8 *name, u32 length, const char *word)
{
    u32 i = 0;
    while (word[i])
        i++;
    return i == length && same(word, name, length);
}

/* A word of the language: taken if it is there. */
static int takes_word(struct input *in, const char *word)
{
    const u8 *begin;
    skip(in);
    const u8 *back = in->at;
    u32 length = read_name(in, &begin);
    if (length && is_word(begin, length, word))
        return 1;
    in->at = back;
    return 0;
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

static int is_date(const struct input *in);
static int read_date(struct input *in, struct value *value);
static int read_duration(struct input *in, struct value *value);
static int read_address(struct input *in, struct value *value);
static u32 unit_of(u8 c);

static int read_number(struct input *in, struct value *value)
{
    *value = (struct value){NUMBER, 0, 0};
    if (is_date(in))
        return read_date(in, value);
    if (!read_digits(in, &value->number))
        return 0;
    if (peek(in) == '.' && in->end - in->at > 1 && is_digit(in->at[1]))
        return read_address(in, value);
    if (unit_of(peek(in)))
        return read_duration(in, value);
    u32 shift = peek(in) == 'k' ? 10 : peek(in) == 'M' ? 20 : peek(in) == 'G' ? 30 : 0;
    if (shift) {
        if (value->number >> (62 - shift))
            return fail(in, BAD_NUMBER);
        value->number <<= shift;
        in->at++;
    }
    return !is_letter(peek(in)) || fail(in, BAD_NUMBER);
}

/* ---- Dates, durations, addresses ---- */

/* Exactly so many decimal digits. */
static int read_fixed(struct input *in, u32 digits, u32 *number)
{
    *number = 0;
    for (u32 i = 0; i < digits; i++, in->at++) {
        if (!is_digit(peek(in)))
            return fail(in, BAD_DATE);
        *number = *number * 10 + (u32)(*in->at - '0');
    }
    return 1;
}

static int is_leap(u32 year) { return (year % 4 == 0 && year % 100 != 0) || year % 400 == 0; }

static u32 days_in(u32 year, u32 month)
{
    static const u8 days[12] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    return days[month - 1] + (u32)(month == 2 && is_leap(year));
}

static i64 days_before(u32 year)
{
    i64 y = (i64)year - 1;
    return y * 365 + y / 4 - y / 100 + y / 400;
}

/* Four digits and a hyphen with a digit after it. */
static int is_date(const struct input *in)
{
    if (in->end - in->at < 6 || in->at[4] != '-' || !is_digit(in->at[5]))
        return 0;
    for (u32 i = 0; i < 4; i++)
        if (!is_digit(in->at[i]))
            return 0;
    return 1;
}

static int read_time(struct input *in, i64 *seconds)
{
    u32 hour, minute, second = 0;
    if (!read_fixed(in, 2, &hour) || peek(in) != ':')
        return fail(in, BAD_DATE);
    in->at++;
    if (!read_fixed(in, 2, &minute))
        return 0;
    if (peek(in) == ':') {
        in->at++;
        if (!read_fixed(in, 2, &second))
            return 0;
    }
    if (hour > 23 || minute > 59 || second > 59)
        return fail(in, BAD_DATE);
    *seconds = (i64)(hour * 3600 + minute * 60 + second);
    return 1;
}

/* YYYY-MM-DD, perhaps with Thh:mm[:ss]: seconds since 1970. */
static int read_date(struct input *in, struct value *value)
{
    u32 year, month, day;
    i64 seconds = 0;
    if (!read_fixed(in, 4, &year) || peek(in) != '-')
        return fail(in, BAD_DATE);
    in->at++;
    if (!read_fixed(in, 2, &month) || peek(in) != '-')
        return fail(in, BAD_DATE);
    in->at++;
    if (!read_fixed(in, 2, &day))
        return 0;
    if (!year || !month || month > 12 || !day || day > days_in(year, month))
        return fail(in, BAD_DATE);
    if (peek(in) == 'T') {
        in->at++;
        if (!read_time(in, &seconds))
            return 0;
    }
    i64 days = days_before(year) - days_before(1970) + (i64)day - 1;
    for (u32 before = 1; before < month; before++)
        days += days_in(year, before);
    *value = (struct value){NUMBER, days * 86400 + seconds, 0};
    return 1;
}

static u32 unit_of(u8 c)
{
    switch (c) {
    case 'd': return 86400;
    case 'h': return 3600;
    case 'm': return 60;
    case 's': return 1;
    default: return 0;
    }
}

/* What comes after the first number of `1h30m`: each unit is smaller than the one before. */
static int read_duration(struct input *in, struct value *value)
{
    i64 total = 0, number = value->number;
    u32 before = 0xffffffff;
    for (;;) {
        u32 unit = unit_of(peek(in));
        if (!unit || unit >= before || number > 0x7fffffff)
            return fail(in, BAD_DATE);
        in->at++;
        total += number * (i64)unit;
        before = unit;
        if (!is_digit(peek(in)))
            break;
        if (!read_digits(in, &number))
            return 0;
    }
    value->number = total;
    return !is_letter(peek(in)) || fail(in, BAD_DATE);
}

static int keep_list(struct input *in, struct value *value, const struct value *own, u32 count)
{
    if (value_count + count > VALUES)
        return fail(in, FULL);
    *value = (struct value){LIST, value_count, count};
    for (u32 i = 0; i < count; i++)
        values[value_count++] = own[i];
    return 1;
}

/* What comes after the first number of `10.0.0.0/8`. */
static int read_address(struct input *in, struct value *value)
{
    i64 part = value->number, address = 0;
    u32 bits = 32;
    for (u32 i = 0; i < 4; i++) {
        if (i) {
            if (peek(in) != '.')
                return fail(in, BAD_ADDRESS);
            in->at++;
            if (!read_digits(in, &part))
                return 0;
        }
        if (part > 255)
            return fail(in, BAD_ADDRESS);
        address = address << 8 | part;
    }
    if (peek(in) == '/') {
        in->at++;
        if (!read_digits(in, &part))
            return 0;
        if (part > 32)
            return fail(in, BAD_ADDRESS);
        bits = (u32)part;
    }
    i64 mask = bits ? (i64)(0xffffffffu << (32 - bits)) : 0;
    if (address & ~mask & 0xffffffff)
        return fail(in, BAD_ADDRESS);
    struct value both[2] = {{NUMBER, address, 0}, {NUMBER, mask, 0}};
    return keep_list(in, value, both, 2);
}

/* ---- Values ---- */

static int read_expression(struct input *in, struct value *value);

static int read_list(struct input *in, struct value *value)
{
    struct value own[LIST_MOST];
    u32 count = 0;
    in->at++;
    if (++in->depth > DEPTH_MOST)
        return fail(in, TOO_DEEP);
    while (!takes(in, ']')) {
        if (count == LIST_MOST)
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
    return keep_list(in, value, own, count);
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

static int read_call(struct input *in, struct value *value);

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
        return is_letter(c) ? read_call(in, value) : fail(in, BAD_CHARACTER);
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

static int read_comparison(struct input *in, struct value *value)
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

static int holds(const struct value *value) { return value->type == NUMBER ? value->number != 0 : value->length != 0; }

static int read_negation(struct input *in, struct value *value)
{
    u32 count = 0;
    while (takes_word(in, "not"))
        count++;
    if (!read_comparison(in, value))
        return 0;
    if (count)
        *value = (struct value){NUMBER, holds(value) != (int)(count & 1), 0};
    return 1;
}

static int read_conjunction(struct input *in, struct value *value)
{
    struct value right;
    if (!read_negation(in, value))
        return 0;
    while (takes_word(in, "and")) {
        if (!read_negation(in, &right))
            return 0;
        *value = (struct value){NUMBER, holds(value) && holds(&right), 0};
    }
    return 1;
}

static int read_expression(struct input *in, struct value *value)
{
    struct value right;
    if (!read_conjunction(in, value))
        return 0;
    while (takes_word(in, "or")) {
        if (!read_conjunction(in, &right))
            return 0;
        *value = (struct value){NUMBER, holds(value) || holds(&right), 0};
    }
    return 1;
}

/* ---- Functions ---- */

static char *text_of(const struct value *value) { return &texts[value->number]; }

static int give_number(struct value *value, i64 number)
{
    *value = (struct value){NUMBER, number, 0};
    return 1;
}

static int call_len(struct input *in, struct value *value, const struct value *a)
{
    return a->type == TEXT || a->type == LIST ? give_number(value, a->length) : fail(in, WRONG_TYPE);
}

static int call_abs(struct input *in, struct value *value, const struct value *a)
{
    (void)in;
    return give_number(value, a->number < 0 ? (i64)(0 - (unsigned long long)a->number) : a->number);
}

static int call_min(struct input *in, struct value *value, const struct value *a)
{
    (void)in;
    return give_number(value, a[0].number < a[1].number ? a[0].number : a[1].number);
}

static int call_max(struct input *in, struct value *value, const struct value *a)
{
    (void)in;
    return give_number(value, a[0].number > a[1].number ? a[0].number : a[1].number);
}

static int call_sum(struct input *in, struct value *value, const struct value *a)
{
    unsigned long long sum = 0;
    for (u32 i = 0; i < a->length; i++) {
        const struct value *one = &values[a->number + i];
        if (one->type != NUMBER)
            return fail(in, WRONG_TYPE);
        sum += (unsigned long long)one->number;
    }
    return give_number(value, (i64)sum);
}

static int begin_text(struct value *value)
{
    *value = (struct value){TEXT, text_used, 0};
    return 1;
}

static int end_text(struct value *value)
{
    value->length = text_used - (u32)value->number;
    return 1;
}

static int call_upper(struct input *in, struct value *value, const struct value *a)
{
    begin_text(value);
    for (u32 i = 0; i < a->length; i++) {
        u8 c = (u8)text_of(a)[i];
        if (!put(in, c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c))
            return 0;
    }
    return end_text(value);
}

static int call_reverse(struct input *in, struct value *value, const struct value *a)
{
    if (a->type == TEXT) {
        begin_text(value);
        for (u32 i = a->length; i-- > 0;)
            if (!put(in, (u8)text_of(a)[i]))
                return 0;
        return end_text(value);
    }
    if (a->type != LIST)
        return fail(in, WRONG_TYPE);
    if (value_count + a->length > VALUES)
        return fail(in, FULL);
    *value = (struct value){LIST, value_count, a->length};
    for (u32 i = a->length; i-- > 0;)
        values[value_count++] = values[a->number + i];
    return 1;
}

/* cut(text, from, count): what there is of it. */
static int call_cut(struct input *in, struct value *value, const struct value *a)
{
    if (a[0].type != TEXT || a[1].type != NUMBER || a[2].type != NUMBER)
        return fail(in, WRONG_TYPE);
    i64 from = a[1].number, count = a[2].number;
    if (from < 0 || count < 0 || from > a[0].length)
        return fail(in, OUT_OF_RANGE);
    if (count > a[0].length - from)
        count = a[0].length - from;
    *value = (struct value){TEXT, a[0].number + from, (u32)count};
    return 1;
}

static i64 position(const struct value *in_it, const struct value *what, u32 from)
{
    for (u32 at = from; at + what->length <= in_it->length; at++) {
        u32 i = 0;
        while (i < what->length && text_of(in_it)[at + i] == text_of(what)[i])
            i++;
        if (i == what->length)
            return at;
    }
    return -1;
}

static int call_find(struct input *in, struct value *value, const struct value *a)
{
    (void)in;
    return give_number(value, position(&a[0], &a[1], 0));
}

/* split(text, by): a list of what is between. */
static int call_split(struct input *in, struct value *value, const struct value *a)
{
    struct value own[LIST_MOST];
    u32 count = 0, from = 0;
    if (!a[1].length)
        return fail(in, OUT_OF_RANGE);
    for (;;) {
        i64 to = position(&a[0], &a[1], from);
        if (count == LIST_MOST)
            return fail(in, FULL);
        own[count++] = (struct value){TEXT, a[0].number + from, (to < 0 ? a[0].length : (u32)to) - from};
        if (to < 0)
            return keep_list(in, value, own, count);
        from = (u32)to + a[1].length;
    }
}

static int call_join(struct input *in, struct value *value, const struct value *a)
{
    if (a[0].type != LIST || a[1].type != TEXT)
        return fail(in, WRONG_TYPE);
    begin_text(value);
    for (u32 i = 0; i < a[0].length; i++) {
        const struct value *one = &values[a[0].number + i];
        if (one->type != TEXT)
            return fail(in, WRONG_TYPE);
        for (u32 j = 0; i && j < a[1].length; j++)
            if (!put(in, (u8)text_of(&a[1])[j]))
                return 0;
        for (u32 j = 0; j < one->length; j++)
            if (!put(in, (u8)text_of(one)[j]))
                return 0;
    }
    return end_text(value);
}

/* All numbers, or all texts. */
static int call_sort(struct input *in, struct value *value, const struct value *a)
{
    struct value own[LIST_MOST];
    if (a->length > LIST_MOST)
        return fail(in, FULL);
    for (u32 i = 0; i < a->length; i++) {
        struct value one = values[a->number + i];
        u32 at = i;
        if (one.type > TEXT || one.type != values[a->number].type)
            return fail(in, WRONG_TYPE);
        for (; at && compare(&own[at - 1], &one) > 0; at--)
            own[at] = own[at - 1];
        own[at] = one;
    }
    return keep_list(in, value, own, a->length);
}

static int put_number(struct input *in, i64 number, u32 base)
{
    char digits[24];
    u32 count = 0;
    unsigned long long left = number < 0 ? 0 - (unsigned long long)number : (unsigned long long)number;
    do {
        u32 digit = (u32)(left % base);
        digits[count++] = (char)(digit < 10 ? '0' + digit : 'a' + digit - 10);
        left /= base;
    } while (left);
    if (number < 0 && !put(in, '-'))
        return 0;
    while (count)
        if (!put(in, (u8)digits[--count]))
            return 0;
    return 1;
}

/* format(text, list): %d, %x, %s and %% in the text. */
static int call_format(struct input *in, struct value *value, const struct value *a)
{
    if (a[0].type != TEXT || a[1].type != LIST)
        return fail(in, WRONG_TYPE);
    u32 used = 0;
    begin_text(value);
    for (u32 i = 0; i < a[0].length; i++) {
        u8 c = (u8)text_of(&a[0])[i];
        if (c != '%') {
            if (!put(in, c))
                return 0;
            continue;
        }
        if (++i == a[0].length)
            return fail(in, BAD_TEXT);
        c = (u8)text_of(&a[0])[i];
        if (c == '%') {
            if (!put(in, c))
                return 0;
            continue;
        }
        if (used == a[1].length)
            return fail(in, NO_NAME);
        const struct value *one = &values[a[1].number + used++];
        if (c == 'd' || c == 'x') {
            if (one->type != NUMBER)
                return fail(in, WRONG_TYPE);
            if (!put_number(in, one->number, c == 'd' ? 10 : 16))
                return 0;
        } else if (c == 's') {
            if (one->type != TEXT)
                return fail(in, WRONG_TYPE);
            for (u32 j = 0; j < one->length; j++)
                if (!put(in, (u8)text_of(one)[j]))
                    return 0;
        } else {
            return fail(in, BAD_TEXT);
        }
    }
    return end_text(value);
}

/* match(text, pattern): * is any characters, ? is one, [a-z] one of these. */
static int matches_set(const struct value *pattern, u32 *at, u8 c)
{
    int found = 0, first = 1, is_not = 0;
    u32 i = *at + 1;
    if (i < pattern->length && text_of(pattern)[i] == '!')
        is_not = 1, i++;
    for (;; first = 0) {
        if (i >= pattern->length)
            return -1;
        u8 low = (u8)text_of(pattern)[i++];
        if (low == ']' && !first)
            break;
        u8 high = low;
        if (i + 1 < pattern->length && text_of(pattern)[i] == '-' && text_of(pattern)[i + 1] != ']') {
            high = (u8)text_of(pattern)[i + 1];
            i += 2;
        }
        found |= low <= c && c <= high;
    }
    *at = i;
    return found != is_not;
}

static int call_match(struct input *in, struct value *value, const struct value *a)
{
    u32 at = 0, in_pattern = 0, star_at = 0, star_pattern = 0, has_star = 0;
    while (at < a[0].length) {
        u8 c = (u8)text_of(&a[0])[at];
        u32 next = in_pattern;
        int fits = 0;
        if (in_pattern < a[1].length) {
            u8 p = (u8)text_of(&a[1])[in_pattern];
            if (p == '*') {
                has_star = 1;
                star_at = at;
                star_pattern = ++in_pattern;
                continue;
            }
            if (p == '[') {
                fits = matches_set(&a[1], &next, c);
                if (fits < 0)
                    return fail(in, BAD_TEXT);
            } else {
                fits = p == '?' || p == c;
                next = in_pattern + 1;
            }
        }
        if (fits) {
            at++;
            in_pattern = next;
        } else if (has_star) {
            at = ++star_at;
            in_pattern = star_pattern;
        } else {
            return give_number(value, 0);
        }
    }
    while (in_pattern < a[1].length && text_of(&a[1])[in_pattern] == '*')
        in_pattern++;
    return give_number(value, in_pattern == a[1].length);
}

enum { ANY = 16 };

static const struct function {
    const char *name;
    u32 count;
    u8 type;                    /* of all arguments, or ANY: it looks itself */
    int (*call)(struct input *in, struct value *value, const struct value *arguments);
} functions[] = {
    {"len", 1, ANY, call_len},     {"abs", 1, NUMBER, call_abs},  {"min", 2, NUMBER, call_min}, {"max", 2, NUMBER, call_max},
    {"sum", 1, LIST, call_sum},    {"upper", 1, TEXT, call_upper}, {"reverse", 1, ANY, call_reverse}, {"cut", 3, ANY, call_cut},
    {"find", 2, TEXT, call_find},  {"split", 2, TEXT, call_split}, {"join", 2, ANY, call_join},  {"sort", 1, LIST, call_sort},
    {"format", 2, ANY, call_format}, {"match", 2, TEXT, call_match},
};

static int read_arguments(struct input *in, struct value *arguments, u32 count)
{
    if (!takes(in, '('))
        return fail(in, UNEXPECTED);
    for (u32 i = 0; i < count; i++)
        if ((i && !takes(in, ',')) || !read_expression(in, &arguments[i]))
            return fail(in, UNEXPECTED);
    return takes(in, ')') || fail(in, UNEXPECTED);
}

/* Its expression is read again, where its parameters are names. */
static int use_rule(struct input *in, struct value *value, const struct rule *rule)
{
    struct value arguments[PARAMETERS];
    if (!read_arguments(in, arguments, rule->count))
        return 0;
    if (turns++ == TURNS_MOST)
        return fail(in, TOO_LONG);
    if (++in->depth > DEPTH_MOST)
        return fail(in, TOO_DEEP);
    u32 before = statements;
    for (u32 i = 0; i < rule->count; i++)
        if (!bind(in, rule->parameters[i].name, rule->parameters[i].length, &arguments[i]))
            return 0;
    const u8 *back = in->at;
    in->at = rule->body;
    if (!read_expression(in, value))
        return 0;
    in->at = back;
    in->depth--;
    leave(in);
    statements = before;
    return 1;
}

static int read_call(struct input *in, struct value *value)
{
    struct value arguments[3];
    const u8 *name;
    u32 length = read_name(in, &name);
    for (u32 i = rule_count; i-- > 0;)
        if (rules[i].length == length && same(rules[i].name, name, length))
            return use_rule(in, value, &rules[i]);
    for (u32 i = 0; i < sizeof functions / sizeof *functions; i++) {
        const struct function *f = &functions[i];
        if (!is_word(name, length, f->name))
            continue;
        if (!read_arguments(in, arguments, f->count))
            return 0;
        for (u32 j = 0; j < f->count && f->type != ANY; j++)
            if (arguments[j].type != f->type)
                return fail(in, WRONG_TYPE);
        return f->call(in, value, arguments);
    }
    return fail(in, NO_NAME);
}

/* ---- What values have to be ---- */

struct demand {
    enum type type;
    int has_range;
    i64 low, high;
};

/* `number 1..10`, `text 1..20` (its length), `list`. */
static int read_demand(struct input *in, struct demand *demand)
{
    static const char *const names_of[] = {"number", "text", "list"};
    u32 type = 0;
    while (type < 3 && !takes_word(in, names_of[type]))
        type++;
    if (type == 3)
        return fail(in, UNEXPECTED);
    *demand = (struct demand){(enum type)type, 0, 0, 0};
    skip(in);
    if (!is_digit(peek(in)))
        return 1;
    demand->has_range = 1;
    if (!read_digits(in, &demand->low) || !takes_two(in, '.', '.'))
        return fail(in, UNEXPECTED);
    skip(in);
    return read_digits(in, &demand->high);
}

static int meets(struct input *in, const struct demand *demand, const struct value *value)
{
    if (value->type != demand->type)
        return fail(in, WRONG_TYPE);
    i64 size = value->type == NUMBER ? value->number : (i64)value->length;
    return !demand->has_range || (demand->low <= size && size <= demand->high) || fail(in, OUT_OF_RANGE);
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

static int read_if(struct input *in, int is_kept)
{
    struct value condition;
    const u8 *name;
    if (!read_expression(in, &condition))
        return 0;
    int is_true = holds(&condition);
    if (!read_block(in, is_kept && is_true))
        return 0;
    const u8 *back = in->at;
    u32 length = read_name(in, &name);
    if (length && is_word(name, length, "else"))
        return read_block(in, is_kept && !is_true);
    in->at = back;
    return 1;
}

static int read_for(struct input *in, int is_kept)
{
    struct value list;
    const u8 *name;
    u32 length = read_name(in, &name);
    if (!length || !takes_word(in, "in") || !read_expression(in, &list))
        return fail(in, UNEXPECTED);
    if (list.type != LIST)
        return fail(in, WRONG_TYPE);
    const u8 *block = in->at;
    if (!is_kept || !list.length)
        return read_block(in, 0);
    for (u32 i = 0; i < list.length; i++) {
        if (turns++ == TURNS_MOST)
            return fail(in, TOO_LONG);
        in->at = block;
        if (!bind(in, name, length, &values[list.number + i]) || !read_block(in, 1))
            return 0;
    }
    return 1;
}

/* `rule name(a, b) = expression`: the expression is read once, as it stands, and its value is nobody's. */
static int read_rule(struct input *in, int is_kept)
{
    const u8 *name;
    u32 length = read_name(in, &name);
    if (!length || length >= NAME_MOST || !takes(in, '('))
        return fail(in, UNEXPECTED);
    if (rule_count == RULES)
        return fail(in, FULL);
    struct rule *rule = &rules[rule_count];
    *rule = (struct rule){.length = length};
    for (u32 i = 0; i < length; i++)
        rule->name[i] = (char)name[i];
    while (!takes(in, ')')) {
        if (rule->count == PARAMETERS || (rule->count && !takes(in, ',')))
            return fail(in, UNEXPECTED);
        struct parameter *one = &rule->parameters[rule->count++];
        one->length = read_name(in, &one->name);
        if (!one->length || one->length >= NAME_MOST)
            return fail(in, NO_NAME);
    }
    if (!takes(in, '='))
        return fail(in, UNEXPECTED);
    rule->body = in->at;
    u32 depth = 0;
    while (in->at < in->end && (depth || (*in->at != '\n' && *in->at != '}'))) {
        u8 c = *in->at++;
        if (c == '(' || c == '[')
            depth++;
        else if ((c == ')' || c == ']') && depth)
            depth--;
        else if (c == '"')
            while (in->at < in->end && *in->at++ != '"')
                if (in->at[-1] == '\\' && in->at < in->end)
                    in->at++;
    }
    rule_count += (u32)is_kept;
    statements += (u32)is_kept;
    return 1;
}

static int read_statement(struct input *in, const u8 *name, u32 length, int is_kept)
{
    struct value value;
    if (is_word(name, length, "if"))
        return read_if(in, is_kept);
    if (is_word(name, length, "for"))
        return read_for(in, is_kept);
    if (is_word(name, length, "rule"))
        return read_rule(in, is_kept);
    skip(in);
    if (peek(in) == '{') {
        value = (struct value){TABLE, in->depth, 0};
        return (!is_kept || bind(in, name, length, &value)) && read_block(in, is_kept);
    }
    struct demand demand;
    int is_demanded = takes(in, ':');
    if (is_demanded && !read_demand(in, &demand))
        return 0;
    if (!takes(in, '='))
        return fail(in, UNEXPECTED);
    if (!read_expression(in, &value))
        return 0;
    if (is_kept && is_demanded && !meets(in, &demand, &value))
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

/* ---- All of it, written out ---- */

static int write(char c)
{
    if (output_used == OUTPUT)
        return 0;
    output[output_used++] = c;
    return 1;
}

static int write_text(const char *text, u32 length)
{
    for (u32 i = 0; i < length; i++)
        if (!write(text[i]))
            return 0;
    return 1;
}

static int write_number(i64 number)
{
    char digits[24];
    u32 count = 0;
    unsigned long long left = number < 0 ? 0 - (unsigned long long)number : (unsigned long long)number;
    do
        digits[count++] = (char)('0' + left % 10);
    while (left /= 10);
    if (number < 0 && !write('-'))
        return 0;
    while (count)
        if (!write(digits[--count]))
            return 0;
    return 1;
}

static int write_value(const struct value *value, u32 depth)
{
    switch (value->type) {
    case NUMBER:
        return write_number(value->number);
    case TEXT:
        return write('"') && write_text(text_of(value), value->length) && write('"');
    case LIST:
        if (depth == DEPTH_MOST)
            return write_text("...", 3);
        if (!write('['))
            return 0;
        for (u32 i = 0; i < value->length; i++)
            if ((i && !write(',')) || !write_value(&values[value->number + i], depth + 1))
                return 0;
        return write(']');
    default:
        return write('{') && write('}');
    }
}

/* As much of the names and their values as there is room for. */
static void write_all(void)
{
    output_used = 0;
    for (u32 i = 0; i < name_count; i++)
        if (!write_text(names[i].name, names[i].length) || !write('=') || !write_value(&names[i].value, 0) || !write('\n'))
            return;
}

int parse(const u8 *text, u32 length)
{
    struct input in = {text, text + length, 0, OK};
    name_count = text_used = value_count = rule_count = statements = turns = 0;
    if (read_statements(&in, 1) && in.at < in.end)
        fail(&in, UNEXPECTED);
    if (!in.error)
        write_all();
    return in.error ? (int)in.error : (int)statements;
}
