/* MC146818 real-time clock with its CMOS RAM (Motorola MC146818A data sheet). vmfs/devices/rtc.py says what is particular. */
#include "module.h"

enum { SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR, A, B, C, D, CENTURY = 0x32 };
enum { DONT_CARE = 0xc0 /* an alarm byte from here on matches all */ };
enum { UIP = 0x80, DIVIDER = 0x70, DIVIDER_RUNS = 0x20 /* above: it is held in reset, or tested */, RATE = 15 };
enum { SET = 0x80, PIE = 0x40, AIE = 0x20, UIE = 0x10, SQWE = 8, BINARY = 4, H24 = 2 };
enum { IRQF = 0x80, PF = 0x40, AF = 0x20, UF = 0x10 };
enum { CRYSTAL = 32768 /* Hz */, UPDATE = 244000 /* ns before the update in which UIP is set */, DAY_SECONDS = 86400 };
enum { CYCLE_YEARS = 400, CYCLE_DAYS = 146097 /* of the Gregorian calendar */ };
enum { BYTES = 128 };

struct rtc {
    struct chip chip;
    unsigned gsi;
    u8 index, cmos[BYTES];
    u64 began;                  /* the guest's time when the divider began the second that it is in; may be before 0: modulo 2**64 */
    u64 seen;                   /* up to which events were worked out */
    struct chip *power;         /* a reference: ACPI's hardware, which is told of interrupts; or NULL */
    bool is_cut;                /* its line goes nowhere: an HPET has it */
    bool missed;                /* a period has ended since the one whose interrupt waits to be read */
};

/* ---- Numbers and the bytes that show them; -1: none ---------------------------------------------------------------------------- */

static u8 to_byte(const struct rtc *r, int number) { return (u8)(r->cmos[B] & BINARY ? number : number / 10 << 4 | number % 10); }

static int to_number(const struct rtc *r, u8 byte)
{
    if (r->cmos[B] & BINARY)
        return byte;
    return byte >> 4 < 10 && (byte & 15) < 10 ? (byte >> 4) * 10 + (byte & 15) : -1;
}

static u8 hour_byte(const struct rtc *r, int hour)
{
    if (r->cmos[B] & H24)
        return to_byte(r, hour);
    return to_byte(r, hour % 12 ? hour % 12 : 12) | (hour >= 12 ? 0x80 : 0);
}

static int hour_number(const struct rtc *r, u8 byte)
{
    int number = to_number(r, r->cmos[B] & H24 ? byte : byte & 0x7f);
    if (!(r->cmos[B] & H24))
        number = number >= 1 && number <= 12 ? number % 12 + (byte & 0x80 ? 12 : 0) : -1;
    return number;
}

struct time_of_day { int hour, minute, second; };

static bool time_of_day(const struct rtc *r, struct time_of_day *t)
{
    *t = (struct time_of_day){hour_number(r, r->cmos[HOURS]), to_number(r, r->cmos[MINUTES]), to_number(r, r->cmos[SECONDS])};
    return t->hour >= 0 && t->hour <= 23 && t->minute >= 0 && t->minute <= 59 && t->second >= 0 && t->second <= 59;
}

/* ---- Days of the calendar, from March of the year 0 on ------------------------------------------------------------------------- */

static i64 days_of(i64 year, int month, int day)
{
    year -= month <= 2;
    i64 cycle = year / CYCLE_YEARS, y = year % CYCLE_YEARS; /* of years from 0 on */
    return cycle * CYCLE_DAYS + y * 365 + y / 4 - y / 100 + (153 * (month > 2 ? month - 3 : month + 9) + 2) / 5 + day - 1;
}

static void date_of(i64 days, i64 *year, int *month, int *day)
{
    i64 cycle = days / CYCLE_DAYS, d = days % CYCLE_DAYS;
    i64 y = (d - d / 1460 + d / 36524 - d / (CYCLE_DAYS - 1)) / 365;
    d -= y * 365 + y / 4 - y / 100;
    int m = (int)(5 * d + 2) / 153;
    *day = (int)d - (153 * m + 2) / 5 + 1;
    *month = m < 10 ? m + 3 : m - 9;
    *year = y + cycle * CYCLE_YEARS + (*month <= 2);
}

static int days_in(i64 year, int month)
{
    static const u8 days[12] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    bool leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    return days[month - 1] + (month == 2 && leap);
}

/* ---- Updates -------------------------------------------------------------------------------------------------------------------- */

/* Turn a field of `count` values from `first` on; how often it went around. */
static u64 carry(struct rtc *r, unsigned index, int first, int count, u64 by)
{
    int number = to_number(r, r->cmos[index]);
    if (number < first || number >= first + count)
        return 0;
    u64 at = (u64)(number - first) + by;
    r->cmos[index] = to_byte(r, first + (int)(at % (u64)count));
    return at / (u64)count;
}

static u64 carry_hours(struct rtc *r, u64 by)
{
    int hour = hour_number(r, r->cmos[HOURS]);
    if (hour < 0 || hour > 23)
        return 0;
    r->cmos[HOURS] = hour_byte(r, (int)(((u64)hour + by) % 24));
    return ((u64)hour + by) / 24;
}

static void carry_date(struct rtc *r, u64 by)
{
    int year = to_number(r, r->cmos[YEAR]), century = to_number(r, r->cmos[CENTURY]);
    int month = to_number(r, r->cmos[MONTH]), day = to_number(r, r->cmos[DAY]);
    bool has_century = century >= 0 && century < 100;
    if (year < 0 || year > 99 || month < 1 || month > 12)
        return;
    i64 full = year + 100 * (has_century ? century : 20);
    if (day < 1 || day > days_in(full, month))
        return;
    i64 cycles = (i64)(by / CYCLE_DAYS);
    full += CYCLE_YEARS; /* so that January of the year 0 has days from 0 on */
    date_of(days_of(full, month, day) + (i64)(by % CYCLE_DAYS), &full, &month, &day);
    full = (full - CYCLE_YEARS + CYCLE_YEARS * (cycles % 10000)) % 10000;
    r->cmos[DAY] = to_byte(r, day);
    r->cmos[MONTH] = to_byte(r, month);
    r->cmos[YEAR] = to_byte(r, (int)(full % 100));
    if (has_century)
        r->cmos[CENTURY] = to_byte(r, (int)(full / 100));
}

static void update_time(struct rtc *r, u64 by)
{
    by = carry(r, SECONDS, 0, 60, by);
    by = by ? carry(r, MINUTES, 0, 60, by) : 0;
    by = by ? carry_hours(r, by) : 0;
    if (by) {
        carry(r, WEEKDAY, 1, 7, by);
        carry_date(r, by);
    }
}

/* How many updates from here the alarm matches; 0: it does not, or the time is none. */
static u64 updates_to_alarm(const struct rtc *r)
{
    struct time_of_day at;
    if (!time_of_day(r, &at))
        return 0;
    u8 hours = r->cmos[HOURS_ALARM], minutes = r->cmos[MINUTES_ALARM], seconds = r->cmos[SECONDS_ALARM];
    int start = (at.hour * 60 + at.minute) * 60 + at.second;
    for (int t = start + 1; t <= start + DAY_SECONDS;) {
        int hour = t / 3600 % 24, minute = t / 60 % 60, second = t % 60;
        if (hours < DONT_CARE && hours != hour_byte(r, hour))
            t = (t / 3600 + 1) * 3600;
        else if (minutes < DONT_CARE && minutes != to_byte(r, minute))
            t = (t / 60 + 1) * 60;
        else if (seconds < DONT_CARE && seconds != to_byte(r, second))
            t++;
        else
            return (u64)(t - start);
    }
    return 0;
}

/* ---- The divider ------------------------------------------------------------------------------------------------------------------- */

static bool runs(const struct rtc *r) { return (r->cmos[A] & DIVIDER) <= DIVIDER_RUNS; }

/* Of the periodic interrupt, in cycles of the crystal; 0: off. */
static u64 period(const struct rtc *r)
{
    unsigned rate = r->cmos[A] & RATE;
    return rate ? 1ull << (rate < 3 ? rate + 6 : rate - 1) : 0;
}

static u64 cycles(u64 ns) { return (u64)((unsigned __int128)ns * CRYSTAL / SECOND); }

/* Work out what has happened since the last look. */
static void catch_up(struct rtc *r, u64 now)
{
    /* Where `seen` was to be before 0 (rtc_shift), there may be seconds to be worked out at 0 already. */
    if (now < r->seen || (now == r->seen && now - r->began < SECOND))
        return;
    u64 was = r->seen - r->began, elapsed = now - r->began, p = period(r);
    r->seen = now;
    if (!runs(r))
        return;
    if (p && cycles(elapsed) / p != cycles(was) / p) {
        r->missed |= r->cmos[C] & PF;
        r->cmos[C] |= PF;
    }
    u64 updates = elapsed / SECOND;
    if (!updates)
        return;
    r->began += updates * SECOND;
    if (r->cmos[B] & SET)
        return;
    u64 alarm = updates_to_alarm(r);
    r->cmos[C] |= UF | (alarm && alarm <= updates ? AF : 0);
    update_time(r, updates);
}

/* Be called for the next interrupt that is enabled. And for the end of the period after a periodic one that waits: a machine whose
 * host lets it wait does not let time pass this (core/chip/clock.c), so that no tick is lost. */
static void arm(struct rtc *r, u64 now)
{
    u8 enabled = r->cmos[B];
    u64 first = BUS_NEVER, p = period(r), alarm;
    bool waits = r->cmos[C] & IRQF;
    if (runs(r) && enabled & (PIE | AIE | UIE) && !(waits && r->missed)) {
        if (enabled & PIE && p) {
            u64 next = (cycles(now - r->began) / p + 1) * p;
            first = (u64)(((unsigned __int128)next * SECOND + CRYSTAL - 1) / CRYSTAL);
        }
        if (enabled & UIE && !waits && !(enabled & SET) && SECOND < first)
            first = SECOND;
        if (enabled & AIE && !waits && !(enabled & SET) && (alarm = updates_to_alarm(r)) && alarm * SECOND < first)
            first = alarm * SECOND;
    }
    bus_set_due(&r->chip, first == BUS_NEVER ? BUS_NEVER : r->began + first);
}

static void update(struct rtc *r, u64 now)
{
    catch_up(r, now);
    bool on = r->cmos[C] & r->cmos[B] & (PF | AF | UF);
    if (on && !(r->cmos[C] & IRQF) && r->power)
        power_clock_rang(r->power);
    r->cmos[C] = (r->cmos[C] & ~IRQF) | (on ? IRQF : 0);
    bus_set_line(r->chip.bus, r->chip.number, r->gsi, on && !r->is_cut);
    arm(r, now);
}

/* ---- Registers ------------------------------------------------------------------------------------------------------------------------ */

static void show(struct rtc *r, bool is_time, const struct time_of_day *t, const int date[5]);
static const u8 date_bytes[5] = {WEEKDAY, DAY, MONTH, YEAR, CENTURY};

static void write_b(struct rtc *r, u8 value)
{
    u8 was = r->cmos[B];
    int date[5];
    struct time_of_day t;
    bool is_time = time_of_day(r, &t);
    for (unsigned i = 0; i < 5; i++)
        date[i] = to_number(r, r->cmos[date_bytes[i]]);
    if (value & SET && !(was & SET))
        value &= ~UIE; /* "the SET bit going high clears it" */
    r->cmos[B] = value;
    /* Bytes of the other form are to be written by the program, says the data sheet. For one that does not, and does not stop
     * the clock, the time goes on in the new form (as on QEMU). */
    if ((value ^ was) & (BINARY | H24) && !((value | was) & SET))
        show(r, is_time, &t, date);
}

/* The same time in the form that register B says. */
static void show(struct rtc *r, bool is_time, const struct time_of_day *t, const int date[5])
{
    if (is_time) {
        r->cmos[HOURS] = hour_byte(r, t->hour);
        r->cmos[MINUTES] = to_byte(r, t->minute);
        r->cmos[SECONDS] = to_byte(r, t->second);
    }
    for (unsigned i = 0; i < 5; i++)
        if (date[i] >= 0 && date[i] < 100)
            r->cmos[date_bytes[i]] = to_byte(r, date[i]);
}

static void write_data(struct rtc *r, u8 value, u64 now)
{
    unsigned index = r->index & (BYTES - 1);
    catch_up(r, now);
    if (index == A) {
        bool ran = runs(r);
        r->cmos[A] = value & ~UIP;
        if (runs(r) && !ran) /* "the first update cycle begins one-half second later" */
            r->began = now - SECOND / 2;
    } else if (index == B) {
        write_b(r, value);
    } else if (index != C && index != D) {
        r->cmos[index] = value;
    }
    update(r, now);
}

/* No interrupt waits. */
static void clear_flags(struct rtc *r)
{
    r->cmos[C] = 0;
    r->missed = false;
}

static u8 read_data(struct rtc *r, u64 now)
{
    unsigned index = r->index & (BYTES - 1);
    if (index == C) {
        update(r, now);
        u8 value = r->cmos[C];
        clear_flags(r);
        update(r, now); /* low, and the next one is an edge */
        return value;
    }
    catch_up(r, now);
    if (index == A) {
        bool soon = runs(r) && !(r->cmos[B] & SET) && r->began + SECOND - now <= UPDATE;
        return r->cmos[A] | (soon ? UIP : 0);
    }
    return r->cmos[index];
}

static bool rtc_access(struct chip *chip, struct bus_access *a, unsigned region, u64 offset)
{
    struct rtc *r = (struct rtc *)chip;
    if (!offset && a->write) {
        r->index = (u8)a->value;
        if (a->size > 1)
            write_data(r, (u8)(a->value >> 8), now_of(a));
    } else if (!offset) {
        a->value = r->index;
        if (a->size > 1)
            a->value |= (u64)read_data(r, now_of(a)) << 8;
    } else if (a->write) {
        write_data(r, (u8)a->value, now_of(a));
    } else {
        a->value = read_data(r, now_of(a));
    }
    return true;
}

static void rtc_advance(struct chip *chip, u64 now) { update((struct rtc *)chip, now); }
static const struct chip_kind rtc_kind = {rtc_access, rtc_advance, true};

/* ---- For Python -------------------------------------------------------------------------------------------------------------------- */

static PyObject *rtc_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned gsi;
    struct rtc *self = (struct rtc *)chip_new_on_line(type, &rtc_kind, args, &gsi);
    if (!self)
        return NULL;
    self->gsi = gsi;
    self->cmos[A] = 0x26, self->cmos[B] = H24, self->cmos[D] = 0x80;
    return (PyObject *)self;
}

static PyObject *rtc_set_clock(struct rtc *self, PyObject *args)
{
    unsigned long long now, nanoseconds;
    int year, month, day, weekday, hour, minute, second;
    if (!PyArg_ParseTuple(args, "K(iiiiiii)K", &now, &year, &month, &day, &weekday, &hour, &minute, &second, &nanoseconds))
        return NULL;
    chip_enter(&self->chip);
    self->seen = now;
    self->began = now - nanoseconds % SECOND;
    show(self, true, &(struct time_of_day){hour % 24, minute % 60, second % 60},
         (const int[5]){weekday % 7 + 1, day, month, year % 100, year / 100});
    return bus_done(self->chip.bus);
}

/* The battery keeps the clock and the CMOS going; a reset clears the interrupts' enables and flags. */
static PyObject *rtc_reset(struct rtc *self, PyObject *argument)
{
    u64 now;
    if (!chip_numbers(&argument, 1, &now, 1))
        return NULL;
    chip_enter(&self->chip);
    self->index = 0;
    catch_up(self, now);
    self->cmos[B] &= (u8)~(PIE | AIE | UIE | SQWE);
    clear_flags(self);
    update(self, now);
    return bus_done(self->chip.bus);
}

/* The machine sleeps in S3 until the alarm, if that is enabled: the battery's clock is there then, and its other interrupts are off. */
static PyObject *rtc_sleep_to_alarm(struct rtc *self, PyObject *argument)
{
    u64 now, alarm;
    if (!chip_numbers(&argument, 1, &now, 1))
        return NULL;
    chip_enter(&self->chip);
    catch_up(self, now);
    alarm = runs(self) && (self->cmos[B] & (SET | AIE)) == AIE ? updates_to_alarm(self) : 0;
    if (alarm) {
        update_time(self, alarm);
        self->cmos[B] &= (u8)~(PIE | UIE | SQWE);
        clear_flags(self);
        self->cmos[C] = AF | UF; /* IRQF comes when the clock is loaded with this after the reset, and RTC_STS with it */
        self->began = now;
    }
    arm(self, now);
    if (!bus_leave(self->chip.bus))
        return NULL;
    return PyLong_FromUnsignedLongLong(alarm);
}

/* Once. */
static PyObject *rtc_tell(struct rtc *self, PyObject *power)
{
    struct module_state *state = PyType_GetModuleState(Py_TYPE(self));
    if (Py_TYPE(power) != state->types[TYPE_POWER] || self->power)
        return PyErr_Format(PyExc_TypeError, "a Power, once");
    self->power = (struct chip *)Py_NewRef(power);
    Py_RETURN_NONE;
}

static void rtc_dealloc(struct rtc *self)
{
    Py_CLEAR(self->power);
    chip_dealloc(&self->chip);
}

static PyObject *rtc_connect(struct rtc *self, PyObject *args)
{
    unsigned long long now;
    int connected;
    if (!PyArg_ParseTuple(args, "Kp", &now, &connected))
        return NULL;
    chip_enter(&self->chip);
    self->is_cut = !connected;
    update(self, now);
    return bus_done(self->chip.bus);
}

static PyObject *rtc_shift(struct rtc *self, PyObject *argument)
{
    long long by = PyLong_AsLongLong(argument);
    if (by == -1 && PyErr_Occurred())
        return NULL;
    chip_enter(&self->chip);
    self->began += (u64)by;
    self->seen = by < 0 && self->seen < (u64)-by ? 0 : self->seen + (u64)by;
    if (self->chip.due != BUS_NEVER)
        bus_set_due(&self->chip, self->chip.due + (u64)by);
    return bus_done(self->chip.bus);
}

static PyObject *rtc_state(struct rtc *self, PyObject *argument)
{
    u64 now;
    if (!chip_numbers(&argument, 1, &now, 1))
        return NULL;
    chip_enter(&self->chip);
    catch_up(self, now);
    struct rtc r = *self;
    if (!bus_leave(self->chip.bus))
        return NULL;
    /* One that is held begins anew when it is let go. */
    return Py_BuildValue("{sBsy#sL}", "index", r.index, "cmos", r.cmos, (Py_ssize_t)BYTES, "divider",
                         runs(&r) ? (long long)(now - r.began) : 0ll);
}

static PyObject *rtc_load(struct rtc *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"now", "index", "cmos", "divider", NULL};
    unsigned long long now;
    long long divider;
    u8 index;
    Py_buffer cmos;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Kby*L", names, &now, &index, &cmos, &divider))
        return NULL;
    if (cmos.len != BYTES) {
        PyBuffer_Release(&cmos);
        return PyErr_Format(PyExc_ValueError, "a CMOS RAM has %d bytes", BYTES);
    }
    chip_enter(&self->chip);
    self->index = index;
    memcpy(self->cmos, cmos.buf, BYTES);
    PyBuffer_Release(&cmos);
    self->seen = now;
    self->began = now - (u64)divider;
    update(self, now);
    return bus_done(self->chip.bus);
}

static PyObject *rtc_get(struct rtc *self, PyObject *argument)
{
    unsigned long index = PyLong_AsUnsignedLong(argument);
    if (index == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromLong(self->cmos[index & (BYTES - 1)]);
}

/* Bytes that firmware left in the CMOS; not those of the clock. */
static PyObject *rtc_put(struct rtc *self, PyObject *args)
{
    unsigned index;
    u8 value;
    if (!PyArg_ParseTuple(args, "Ib", &index, &value))
        return NULL;
    if (index <= D || index >= BYTES)
        return PyErr_Format(PyExc_ValueError, "byte %u is none of the RAM's", index);
    chip_enter(&self->chip);
    self->cmos[index] = value;
    return bus_done(self->chip.bus);
}

static PyMethodDef rtc_methods[] = {
    CHIP_METHODS,
    {"set_clock", (PyCFunction)rtc_set_clock, METH_VARARGS,
     "set_clock(now, (year, month, day, weekday, hour, minute, second), nanoseconds): show that date; weekday 0 is Sunday"},
    {"put", (PyCFunction)rtc_put, METH_VARARGS, "put(index, byte): into the RAM"},
    {"get", (PyCFunction)rtc_get, METH_O, "get(index) -> byte, as it stands"},
    {"reset", (PyCFunction)rtc_reset, METH_O, "reset(now)"},
    {"sleep_to_alarm", (PyCFunction)rtc_sleep_to_alarm, METH_O, "sleep_to_alarm(now) -> seconds until the alarm, to which it goes; 0: none is enabled"},
    {"tell", (PyCFunction)rtc_tell, METH_O, "tell(power): of its interrupts, as ACPI's RTC_STS has it"},
    {"connect", (PyCFunction)rtc_connect, METH_VARARGS, "connect(now, connected): whether its line goes anywhere"},
    {"shift", (PyCFunction)rtc_shift, METH_O, "shift(by): the guest's time was set to what it was and so much"},
    {"state", (PyCFunction)rtc_state, METH_O, "state(now) -> dict"},
    {"load", (PyCFunction)(void (*)(void))rtc_load, METH_VARARGS | METH_KEYWORDS, "load(now=, **state)"},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot rtc_slots[] = {
    {Py_tp_doc, "Rtc(bus, device, gsi)"}, {Py_tp_new, rtc_new}, {Py_tp_dealloc, rtc_dealloc}, {Py_tp_methods, rtc_methods},
    {0, NULL},
};
PyType_Spec rtc_spec = {"vmfs.devices._chips.Rtc", sizeof(struct rtc), 0, Py_TPFLAGS_DEFAULT, rtc_slots};
