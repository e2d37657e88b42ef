/* Where the data of a disk's command are: the tables that drivers of IDE, AHCI and NVMe put into RAM, walked without Python. Each entry is
 * read once. A table that no driver may write gives a number instead of a list, and the device tells its driver what that number means. */
#include "lists.h"

#include <string.h>

enum { PRP = 8, PRP_OF_PAGE = PAGE / PRP };
enum { ROW = 16, ROW_BYTES = 0x3fffff, AHCI_TABLE_MOST = 0xffff }; /* AHCI 1.3.1, 4.2.3.3 */
enum { PRD = 8, PRD_LIMIT = 1 << 16 };                              /* Bus Master IDE 1.0, 1.2 */

struct list { struct span *spans; size_t count, room; bool no_memory; };

/* Neighbours are one. */
static enum list_error add(struct list *list, const struct ram *ram, u64 address, u64 length)
{
    if (!ram_has(ram, address, length))
        return LIST_NOT_RAM;
    struct span *last = list->count ? &list->spans[list->count - 1] : NULL;
    if (last && last->address + last->length == address && last->length <= UINT32_MAX - length && ram_has(ram, last->address, last->length + length)) {
        last->length += (u32)length;
        return LIST_RIGHT;
    }
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        struct span *more = PyMem_RawRealloc(list->spans, room * sizeof *more);
        if (!more) {
            list->no_memory = true;
            return LIST_NOT_RAM;
        }
        list->spans = more, list->room = room;
    }
    list->spans[list->count++] = (struct span){address, (u32)length};
    return LIST_RIGHT;
}

static u64 load64(const struct ram *ram, u64 at)
{
    u64 value;
    memcpy(&value, ram->data + at, sizeof value);
    return value;
}

static enum list_error page_list(struct list *list, const struct ram *ram, u64 at, u64 left)
{
    if (at % PRP)
        return LIST_CROOKED;
    for (;;) {
        u64 room = PRP_OF_PAGE - at % PAGE / PRP, pages = (left + PAGE - 1) / PAGE, count = room < pages ? room : pages;
        if (!ram_has(ram, at, PRP * count))
            return LIST_NOT_RAM;
        u64 here = pages > room ? count - 1 : count, next = load64(ram, at + PRP * (count - 1));
        for (u64 i = 0; i < here; i++) {
            u64 pointer = load64(ram, at + PRP * i), size = left < PAGE ? left : PAGE;
            enum list_error error = pointer % PAGE ? LIST_CROOKED : add(list, ram, pointer, size);
            if (error)
                return error;
            left -= size;
        }
        if (pages <= room)
            return LIST_RIGHT;
        if (next % PAGE) /* so that each list but the first has pages, and the way has an end */
            return LIST_CROOKED;
        at = next;
    }
}

/* NVM Express 1.4, 4.3. */
static enum list_error prp_list(struct list *list, const struct ram *ram, u64 prp1, u64 prp2, u64 length)
{
    if (prp1 % 4)
        return LIST_CROOKED;
    u64 first = PAGE - prp1 % PAGE < length ? PAGE - prp1 % PAGE : length, left = length - first;
    enum list_error error = add(list, ram, prp1, first);
    if (error || !left)
        return error;
    if (left > PAGE)
        return page_list(list, ram, prp2, left);
    return prp2 % PAGE ? LIST_CROOKED : add(list, ram, prp2, left);
}

static PyObject *made(struct list *list, enum list_error error)
{
    PyObject *rows = error ? PyLong_FromLong(error) : PyList_New((Py_ssize_t)list->count);
    for (size_t i = 0; rows && !error && i < list->count; i++) {
        PyObject *row = Py_BuildValue("(KI)", (unsigned long long)list->spans[i].address, list->spans[i].length);
        if (row)
            PyList_SET_ITEM(rows, (Py_ssize_t)i, row);
        else
            Py_CLEAR(rows);
    }
    if (list->no_memory) {
        Py_CLEAR(rows);
        PyErr_NoMemory();
    }
    PyMem_RawFree(list->spans);
    return rows;
}

PyObject *ram_prps(struct ram *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[3];
    struct list list = {0};
    if (!chip_numbers(args, count, n, 3))
        return NULL;
    enum list_error error = prp_list(&list, self, n[0], n[1], n[2]);
    return made(&list, error);
}

PyObject *ram_prdt(struct ram *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[4];
    struct list list = {0};
    if (!chip_numbers(args, count, n, 4))
        return NULL;
    u64 table = n[0], rows = n[1], skip = n[2], left = n[3];
    bool interrupts = false;
    enum list_error error = rows <= AHCI_TABLE_MOST ? LIST_RIGHT : LIST_CROOKED;
    for (u64 i = 0; !error && left && i < rows; i++) {
        if (!ram_has(self, table + ROW * i, ROW)) {
            error = LIST_NOT_RAM;
            break;
        }
        u64 address = load64(self, table + ROW * i) & ~1ull;
        u32 word = (u32)(load64(self, table + ROW * i + 8) >> 32);
        u64 size = ((word & ROW_BYTES) | 1) + 1;
        if (skip >= size) {
            skip -= size;
            continue;
        }
        u64 taken = size - skip < left ? size - skip : left;
        error = address <= UINT64_MAX - size ? add(&list, self, address + skip, taken) : LIST_NOT_RAM;
        skip = 0;
        left -= taken;
        interrupts |= word >> 31;
    }
    PyObject *rows_of = made(&list, error);
    return rows_of ? Py_BuildValue("(NO)", rows_of, interrupts ? Py_True : Py_False) : NULL;
}

PyObject *ram_prds(struct ram *self, PyObject *const *args, Py_ssize_t count)
{
    u64 n[2];
    struct list list = {0};
    if (!chip_numbers(args, count, n, 2))
        return NULL;
    u64 table = n[0], left = n[1];
    bool all = false;
    enum list_error error = LIST_CROOKED; /* a table without an end */
    for (u64 i = 0; i < PRD_LIMIT / PRD; i++) {
        u64 at = (table & ~(u64)(PRD_LIMIT - 1)) | ((table + PRD * i) & (PRD_LIMIT - 1)); /* it does not cross 64 KiB */
        if (!ram_has(self, at, PRD)) {
            error = LIST_NOT_RAM;
            break;
        }
        u64 row = load64(self, at), size = row >> 32 & 0xfffe;
        if (!size)
            size = PRD_LIMIT;
        u64 taken = size < left ? size : left;
        if ((error = taken ? add(&list, self, row & 0xfffffffe, taken) : LIST_RIGHT))
            break;
        left -= taken;
        if (row >> 63 || !left) {
            all = row >> 63 && taken == size;
            break;
        }
        error = LIST_CROOKED;
    }
    PyObject *rows_of = made(&list, error);
    return rows_of ? Py_BuildValue("(NO)", rows_of, all ? Py_True : Py_False) : NULL;
}
