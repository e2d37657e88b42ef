"""MACHINES: what kinds of machine there are, and the devices of each: ports, addresses and lines in one table.

A device is a row of PC_DEVICES and a module. What a user attaches besides (disks, networks) is plugged into the PCI
bus when it is attached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vmfs.devices.board import Board, BoardState, Packed
from vmfs.devices.chipset import Q35
from vmfs.devices.debugport import DebugConsole, DebugExit
from vmfs.devices.device import Device
from vmfs.devices.display import Display
from vmfs.devices.dma import Dma
from vmfs.devices.floppy import DRIVES, Fdc, FloppyDrive
from vmfs.devices.fw_cfg import FwCfg
from vmfs.devices.hpet import Hpet
from vmfs.devices.i8042 import I8042
from vmfs.devices.ide.controller import Ide
from vmfs.devices.ide.drive import NAMES, Drive
from vmfs.devices.isa import IsaBridge
from vmfs.devices.network import roms as network_roms
from vmfs.devices.network.ne2000 import Ne2000
from vmfs.devices.parallel import ParallelPort
from vmfs.devices.pci import Bridge, HostBridge, PciDevice
from vmfs.devices.pflash import NAMES as FLASH_NAMES
from vmfs.devices.pflash import TOP, Pflash
from vmfs.devices.power import Power, PowerFunction, rebased
from vmfs.devices.q35 import Lpc, Mch, SmbusFunction
from vmfs.devices.rtc import Rtc
from vmfs.devices.sata.ahci import NAMES as SATA_NAMES
from vmfs.devices.sata.ahci import Ahci
from vmfs.devices.screen import vga_bios
from vmfs.devices.serial import Serial
from vmfs.devices.smbus import Smbus
from vmfs.devices.speaker import Speaker
from vmfs.devices.usb.device import UsbDevice
from vmfs.devices.usb.hid import UsbKeyboard, UsbTablet
from vmfs.devices.usb.xhci import Xhci
from vmfs.devices.virtio.gpu import Gpu
from vmfs.devices.vmgenid import VmGenId
from vmfs.engine.base import Machine
from vmfs.memory.ram import PAGE, Memory
from vmfs.words.errors import Busy, Invalid, Unsupported


@dataclass(frozen=True, slots=True)
class Row:
    """A device of a machine: its name under dev/, and what makes it."""

    name: str
    make: Callable[[Board, str], Device]


def _vmgenid(board: Board, name: str) -> Device:
    power = board.devices["power"]
    assert isinstance(power, Power)
    return VmGenId(board, name, power)


def _hpet(board: Board, name: str) -> Device:
    rtc = board.devices["rtc"]
    assert isinstance(rtc, Rtc)

    def replaced(by_it: bool) -> None:
        board.set_timer_output(not by_it)
        rtc.connect(not by_it)

    return Hpet(board, name, replaced)


PC_DEVICES: tuple[Row, ...] = (
    Row("com1", lambda board, name: Serial(board, name, 0x3F8, 4)),
    Row("com2", lambda board, name: Serial(board, name, 0x2F8, 3)),
    Row("com3", lambda board, name: Serial(board, name, 0x3E8, 4)),
    Row("com4", lambda board, name: Serial(board, name, 0x2E8, 3)),
    Row("lpt1", lambda board, name: ParallelPort(board, name, 0x378, 7)),
    Row("speaker", Speaker),
    Row("power", Power),  # before the clock, which may tell it of an interrupt when it is loaded
    Row("rtc", lambda board, name: Rtc(board, name, board.memory.size)),
    Row("smbus", Smbus),
    Row("dma", Dma),
    Row("vmgenid", _vmgenid),
    Row("hpet", _hpet),
    Row("keyboard", I8042),
    Row("fw-cfg", FwCfg),
    Row("debugcon", lambda board, name: DebugConsole(board, name, 0xE9)),
    Row("debugcon2", lambda board, name: DebugConsole(board, name, 0x402)),
    Row("debug-exit", lambda board, name: DebugExit(board, name, 0xF4)),
)

_TABLES = "etc/acpi/tables"  # of fw_cfg
DISPLAY_SLOT = 31  # of the PCI bus, out of the way of what is attached
AHCI_SLOT = 30
XHCI_SLOT = 29
IDE_FUNCTION = 1  # of the PIIX3, whose function 0 is the ISA bridge
SATA_FUNCTION = 2  # of the ICH9, whose function 0 is the LPC bridge

D = TypeVar("D", bound=Device)


class Pc(Board):
    """A PC: interrupt controllers and timers in the engine, the rest here."""

    display_slot = DISPLAY_SLOT

    def __init__(self, machine: Machine, memory: Memory) -> None:
        self.check_memory(memory.size)
        super().__init__(machine, memory)
        self.pci = HostBridge(self)
        self.add(self.pci)
        self._plug_bridge()
        for row in PC_DEVICES:
            self.add(row.make(self, row.name))
        rtc, power = self.devices["rtc"], self.devices["power"]
        assert isinstance(rtc, Rtc) and isinstance(power, Power)
        rtc.tell(power.chip)
        smbus = self.devices["smbus"]
        assert isinstance(smbus, Smbus)
        smbus.describe_memory(memory.size)
        self._plug_chipset(smbus)
        self.display = Display(self, "display", self.display_slot)
        self.pci.plug(self.display)
        keyboard = self.devices["keyboard"]
        assert isinstance(keyboard, I8042)
        self.keyboard = keyboard
        self.built_in = frozenset(self.devices)

    @classmethod
    def check_memory(cls, size: int) -> None:
        """Invalid for more RAM than there can be."""
        most = cls.chipset.memory_most
        if most and size > most:
            raise Invalid(f"mem_size: this machine has up to {most >> 20}M, since its PCI Express is above")

    def _plug_bridge(self) -> None:
        self.pci.plug(Bridge(self, "bridge", 0))

    def _plug_chipset(self, smbus: Smbus) -> None:
        slot = self.chipset.isa_slot
        self.pci.plug(IsaBridge(self, "isa-bridge", slot))
        self.pci.plug(PowerFunction(self, "power-pci", slot, self._power_moved, smbus.place))

    @property
    def shown(self) -> Display | Gpu:
        """What the screen shows: a virtio-gpu whose driver has something on it, else the VGA."""
        gpus = (one for one in list(self.devices.values()) if isinstance(one, Gpu) and one.is_shown)
        return next(gpus, self.display)

    # ---- what is attached

    @property
    def others(self) -> Mapping[str, Device]:
        """The devices that do not belong to every machine of this kind."""
        if len(self.devices) == len(self.built_in):
            return {}
        return {name: device for name, device in self.devices.items() if name not in self.built_in}

    def plug(self, device: Device) -> None:
        """Put a device where it belongs; a drive, and what is USB's, into its controller, which comes with the first
        one."""
        if isinstance(device, PciDevice):
            self.pci.plug(device)
        elif isinstance(device, Drive):
            self._connect(device)
        elif isinstance(device, FloppyDrive):
            self._connect_floppy(device)
        elif isinstance(device, UsbDevice):
            self._connect_usb(device)
        elif isinstance(device, (Pflash, Ne2000, Serial)):
            self.add(device)
        else:
            raise Invalid(f"{device.name} goes nowhere")

    def unplug(self, device: Device) -> None:
        """The other way round."""
        controllers = (one for one in (self.ide, self.ahci) if one is not None and one.drives)
        if device is self.fdc or device in controllers:
            raise Busy(f"{device.name}: it goes with the last of its drives")
        if device is self.xhci:
            raise Busy(f"{device.name}: it goes with the last of its devices")
        if isinstance(device, PciDevice):
            self.pci.unplug(device)
        elif isinstance(device, Drive):
            self.remove(device)
            controller = self.ahci if device.name in SATA_NAMES else self.ide
            assert controller is not None
            controller.disconnect(device)
            if not controller.drives:
                self.pci.unplug(controller)
        elif isinstance(device, UsbDevice):
            self.remove(device)
            self._disconnect_usb(device)
        elif isinstance(device, FloppyDrive):
            self.remove(device)
            assert self.fdc is not None
            self.fdc.disconnect(device)
            self._describe_floppies()
            if not any(self.fdc.drives):
                self.remove(self.fdc)
        elif isinstance(device, Pflash):
            if device is not self.flash[-1]:
                raise Busy(f"{device.name}: {self.flash[-1].name} is below it, and goes first")
            device.withdraw()
            self.remove(device)
        elif isinstance(device, (Ne2000, Serial)):
            self.remove(device)

    @property
    def flash(self) -> list[Pflash]:
        """From 4 GiB downwards."""
        return [one for name in FLASH_NAMES if isinstance(one := self.devices.get(name), Pflash)]

    @property
    def flash_end(self) -> int:
        """Where the next flash ends."""
        return self.flash[-1].start if self.flash else TOP

    @property
    def uarts(self) -> tuple[tuple[int, int], ...]:
        """Port and IRQ of each, in the order in which tables name them."""
        found = (device for device in self.devices.values() if isinstance(device, Serial))
        return tuple((one.port, one.irq or 0) for one in sorted(found, key=lambda one: one.name))

    @property
    def ide(self) -> Ide | None:
        ide = self.devices.get("ide")
        return ide if isinstance(ide, Ide) else None

    @property
    def ahci(self) -> Ahci | None:
        ahci = self.devices.get("ahci")
        return ahci if isinstance(ahci, Ahci) else None

    @property
    def xhci(self) -> Xhci | None:
        xhci = self.devices.get("xhci")
        return xhci if isinstance(xhci, Xhci) else None

    @property
    def fdc(self) -> Fdc | None:
        fdc = self.devices.get("fdc")
        return fdc if isinstance(fdc, Fdc) else None

    def _controller(self, found: D | None, make: Callable[[], D]) -> D:
        """The one that there is, or a new one, which comes with the first thing that is connected to it."""
        if found is not None:
            return found
        made = make()
        if isinstance(made, PciDevice):
            self.pci.plug(made)
        else:
            self.add(made)
        return made

    def _make_fdc(self) -> Fdc:
        dma = self.devices["dma"]
        assert isinstance(dma, Dma)
        return Fdc(self, "fdc", dma)

    def _make_ahci(self) -> Ahci:
        return Ahci(self, "ahci", AHCI_SLOT)

    def _make_ide(self) -> Ide:
        return Ide(self, "ide", self.chipset.isa_slot, IDE_FUNCTION)

    def _connect_floppy(self, drive: FloppyDrive) -> None:
        self._controller(self.fdc, self._make_fdc).connect(drive)
        self.add(drive)
        self._describe_floppies()

    def _connect_usb(self, device: UsbDevice) -> None:
        xhci = self._controller(self.xhci, lambda: Xhci(self, "xhci", XHCI_SLOT))
        xhci.connect(device)
        self.add(device)
        self._find_usb_inputs(xhci)

    def _disconnect_usb(self, device: UsbDevice) -> None:
        xhci = self.xhci
        assert xhci is not None
        xhci.disconnect(device)
        self._find_usb_inputs(xhci)
        if not xhci.devices:
            self.pci.unplug(xhci)

    def _find_usb_inputs(self, xhci: Xhci) -> None:
        self.keyboard.keyboards = [one for one in xhci.devices if isinstance(one, UsbKeyboard)]
        self.keyboard.tablets = [one for one in xhci.devices if isinstance(one, UsbTablet)]

    def _describe_floppies(self) -> None:
        rtc = self.devices["rtc"]
        assert isinstance(rtc, Rtc) and self.fdc is not None
        rtc.describe_floppies(*self.fdc.types)

    def free_floppies(self) -> list[str]:
        return [name for name in DRIVES if name not in self.devices]

    def free_drives(self, names: Sequence[str] = NAMES) -> list[str]:
        """The names of IDE drives, or of others, that there are not."""
        return [name for name in names if name not in self.devices]

    def _connect(self, drive: Drive) -> None:
        if drive.name in SATA_NAMES:
            self._controller(self.ahci, self._make_ahci).connect(drive)
        else:
            self._controller(self.ide, self._make_ide).connect(drive)
        self.add(drive)

    def _power_moved(self, base: int | None) -> None:
        """ACPI's hardware, which the tables that firmware asks for then name."""
        power, fw_cfg = self.devices["power"], self.devices["fw-cfg"]
        assert isinstance(power, Power) and isinstance(fw_cfg, FwCfg)
        power.move(base)
        if base is not None and _TABLES in fw_cfg.files:
            fw_cfg.set_file(_TABLES, rebased(fw_cfg.files[_TABLES], base, self.chipset))

    def set_firmware_files(self, files: Mapping[str, bytes], *, loads: bool = False) -> None:
        """Besides them, the VGA BIOS of the host and iPXE for its cards, by the names under which SeaBIOS looks for
        ROMs, and the order in which it tries disks: that in which they were attached."""
        self._touch_all()
        fw_cfg = self.devices["fw-cfg"]
        assert isinstance(fw_cfg, FwCfg)
        roms = {
            f"pci{device.VENDOR:04x},{device.DEVICE:04x}.rom": rom
            for device in self.pci.functions.values()
            if (rom := vga_bios() if device is self.display else network_roms.of(device.VENDOR, device.DEVICE))
        }
        paths = [device.boot_path for device in self.devices.values() if device.boot_path]
        order = {"bootorder": "\n".join(paths).encode() + b"\0"} if paths else {}
        fw_cfg.set_files({**roms, **order, **files}, offers_kernel=loads)
        if files:
            self._leave_to_firmware(wakes=False)

    def _leave_to_firmware(self, *, wakes: bool) -> None:
        for function in self.pci.functions.values():
            function.leave_to_firmware(wakes=wakes)

    def fall_asleep(self) -> None:
        """It is reset because the guest sleeps, and the next run wakes it; by the clock's alarm, where the guest has
        armed that."""
        rtc, power = self.devices["rtc"], self.devices["power"]
        assert isinstance(rtc, Rtc) and isinstance(power, Power)
        alarm = rtc.sleep_to_alarm() if power.wakes_by_clock else None
        self.reset()
        power.woken()
        if alarm is not None:
            rtc.load(alarm)  # which tells `power`

    def wakes_by_firmware(self) -> None:
        """A run begins with firmware that is to wake the guest."""
        rtc = self.devices["rtc"]
        assert isinstance(rtc, Rtc)
        self._leave_to_firmware(wakes=True)
        rtc.say_resume()

    def fill_memory(self) -> None:
        """The machine is one of this kind now: have in its RAM what is there when it is switched on."""

    def handed_over(self, *, in_real_mode: bool) -> None:
        """A run begins without firmware in the machine: that has done its work, and the CPU is in real mode or not."""

    def memory_resized(self) -> None:
        super().memory_resized()
        self.display.show_memory()
        rtc = self.devices["rtc"]
        smbus = self.devices["smbus"]
        assert isinstance(rtc, Rtc) and isinstance(smbus, Smbus)
        rtc.describe_memory(self.memory.size)
        smbus.describe_memory(self.memory.size)


_PATTERN = hashlib.shake_128(b"RAM of a strict machine").digest(PAGE).replace(b"\0", b"\xa5")


class StrictPc(Pc):
    """A PC that forgives less, for those who go to real hardware with what they have tried here. RAM that nobody has
    written has a pattern, and reads of it are told of; where no firmware is, the A20 gate is closed for what begins in
    real mode. Only on an engine that sees such reads."""

    sees_unwritten = True

    def __init__(self, machine: Machine, memory: Memory) -> None:
        machine.set_fresh(_PATTERN, memory.end)
        super().__init__(machine, memory)

    def fill_memory(self) -> None:
        self.memory.fill_holes(_PATTERN)

    def memory_resized(self) -> None:
        super().memory_resized()
        self.fill_memory()
        self.machine.set_fresh(_PATTERN, self.memory.end)

    def move_to(self, machine: Machine) -> None:
        machine.set_fresh(_PATTERN, self.memory.end)
        super().move_to(machine)

    def put(self, state: BoardState, devices: Packed, present: tuple[BoardState, Packed] | None = None) -> None:
        """RAM is what it was then: what the CPU has written since is no sign any more."""
        super().put(state, devices, present)
        self.machine.set_fresh(_PATTERN, self.memory.end)

    def handed_over(self, *, in_real_mode: bool) -> None:
        if in_real_mode:
            self.keyboard.close_a20()


class Q35Pc(Pc):
    """A PC with a Q35 in place of the i440FX: PCI Express's configuration spaces in memory, and an ICH9, whose SATA
    controller is there with its first drive. It has no IDE."""

    chipset = Q35
    display_slot = 1

    def _plug_bridge(self) -> None:
        self.pci.plug(Mch(self, "bridge", 0, self.pci))

    def _plug_chipset(self, smbus: Smbus) -> None:
        slot = self.chipset.isa_slot
        self.pci.plug(Lpc(self, "isa-bridge", slot, self._power_moved))
        self.pci.plug(SmbusFunction(self, "smbus-pci", slot, smbus))

    def _make_ahci(self) -> Ahci:
        return Ahci(self, "ahci", self.chipset.isa_slot, SATA_FUNCTION)

    def _make_ide(self) -> Ide:
        raise Unsupported("a q35 has no IDE: a disk of it is `ahci PATH`, a CD-ROM drive `ahci-cdrom PATH`")


MACHINES: Mapping[str, type[Pc] | None] = {
    "bare": None,  # a CPU, memory, and whatever answers its exits
    "pc": Pc,
    "strict": StrictPc,
    "q35": Q35Pc,
}


def machine_type(name: str) -> type[Pc] | None:
    """The board of a machine; Invalid for a name that is none."""
    if name not in MACHINES:
        raise Invalid(f"machine: there is no {name[:40]!r}; there are {', '.join(MACHINES)}")
    return MACHINES[name]
