/* The registers of a VGA, for what accesses its memory and what draws its picture. */
#ifndef VMFS_CHIPS_VGA_H
#define VMFS_CHIPS_VGA_H

#include "chips.h"

enum { SEQUENCER = 8, CRTC = 25, GRAPHICS = 9, ATTRIBUTES = 21, DAC = 768, PLANES = 1 << 18 };
/* The low bits of LAYOUT_PLANES are the window (graphics register 6). */
enum { LAYOUT_PLANES = 0, LAYOUT_TEXT_B0 = 4, LAYOUT_TEXT_B8 = 5, LAYOUT_CHAINED = 6 };

struct vga {
    struct chip chip;
    Py_buffer buffer;
    u8 *memory;
    u32 latch;
    u8 misc, feature, sequencer_index, crtc_index, graphics_index, attribute_index, dac_mask;
    bool attribute_data;                /* the flip-flop: port 3C0 expects data */
    bool dac_reading, dac_8bit;
    bool is_linear;                     /* the window is another's */
    unsigned dac_read, dac_write;       /* the colour, times 3, and the channel */
    u8 sequencer[SEQUENCER], crtc[CRTC], graphics[GRAPHICS], attributes[ATTRIBUTES], dac[DAC];
    u8 dac_latch[3];                    /* red and green of the colour that is being written */
};

unsigned vga_layout(const struct vga *v);
PyObject *vga_draw(struct vga *self, PyObject *args);
PyObject *vga_cells(struct vga *self, PyObject *args);
PyObject *vga_seen(struct vga *self, PyObject *args);

#endif
