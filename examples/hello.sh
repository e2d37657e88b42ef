#!/bin/bash
# hello.sh MOUNT: a guest prints through a serial port, and this script is the port.
set -euo pipefail
vm=${1:?usage: hello.sh MOUNT}/hello.$$

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
echo real > "$vm/mode"

# 7c00  mov si, 0x7c1a     7c08  mov ah, al          7c12  mov dl, 0xf8
# 7c03  lodsb              7c0a  mov dx, 0x3fd       7c14  mov al, ah
# 7c04  test al, al        7c0d  in al, dx           7c16  out dx, al
# 7c06  jz 0x7c19          7c0e  test al, 0x20       7c17  jmp 0x7c03
#                          7c10  jz 0x7c0d           7c19  hlt
{
    printf '\xbe\x1a\x7c\xac\x84\xc0\x74\x11\x88\xc4\xba\xfd\x03\xec\xa8\x20\x74\xfb'
    printf '\xb2\xf8\x88\xe0\xee\xeb\xea\xf4%s\0' 'Hello from a guest'
} | dd of="$vm/mem" bs=4k seek=$((0x7c00)) oflag=seek_bytes iflag=fullblock conv=notrunc status=none
xxd -s $((0x7c00)) -l 48 "$vm/mem"
echo 'rip 0x7c00' > "$vm/registers"

printed=
polls=0
while exit=$(cat "$vm/vm_run"); do
    case $exit in
    'io direction=in port=0x3fd '*)             # line status: at first busy, then the transmitter is empty
        if ((polls++ % 2)); then printf '\x20'; else printf '\x00'; fi > "$vm/exit.data" ;;
    'io direction=out port=0x3f8 '*)
        data=${exit#*data=0x}
        printf -v byte "\\x${data%% *}"
        printed+=$byte ;;
    hlt*)
        break ;;
    *)
        echo "unexpected: $exit" >&2
        exit 1 ;;
    esac
done
echo "it printed '$printed', asking $polls times whether it may, and ended with: $exit"
grep -E '^(rax|rdx|rsi|rip) ' "$vm/registers"

[ "$printed" = 'Hello from a guest' ]
[ "$exit" = 'hlt rip=0x7c1a' ]
[ $polls = $((2 * ${#printed})) ]
