# The second half of demo.sh, which reads it: Linux.

"$here/scripts/fetch_demo.sh" || exit 1
boot=$here/.cache/demo

say "Debian's kernel, as it is, in a PC: serial ports, a display, PCI, timers."
run "mkdir $vmfs/pc && cd $vmfs/pc && echo emulator > engine && echo pc > machine" '^$'
run "cp $boot/vmlinuz kernel; cp $boot/initrd initrd; echo 'console=tty0 console=ttyS0 quiet' > cmdline" '^$'
run 'echo run > state' '^$'
run "time sed '/guest: up/q' console" 'guest: up'

say 'Type a command; look at the screen, which is a file, too.'
run "echo uname -sr > console; sed '/^Linux/q' console" 'Linux 6'
run 'sed "/^ *$/d" screen.txt' 'Hello from a directory'

say 'Its symbols are found in its memory. A breakpoint in the kernel; a command in the guest that reaches it.'
run 'echo pause > state; echo kallsyms > symbols; wc -l < symbols' '^[0-9]{5}'
run 'echo on > history                # from here on it has a past'
run 'echo "break __x64_sys_mkdir" > debug'
run 'echo mkdir /tmp/made > console; cat vm_run' 'debug cause=breakpoint id=1 rip=0x'
run 'head -n 3 stack' '__x64_sys_mkdir'
run 'head -n 3 disasm' '<__x64_sys_mkdir>'

say 'The page table, as text: where the kernel is, with rights and physical addresses.'
run 'grep -m 4 ffffffff pagetable' 'r-xs|r-x'

say 'One instruction back, and it is there again. Who wrote the clock last?'
run "echo 'back 1' > vm_run && cat exit && head -n 1 disasm" 'cause=step rip=0x.*<.*> *'
run 'cat vm_run' 'cause=breakpoint id=1 rip=0x'
run "echo 'jiffies_64 8' > writer && cat writer" 'writer=instruction count=[0-9]+ rip=0x[0-9a-f]+ symbol='

say 'A snapshot, and two forks of it: machines of their own, that share its memory. Each goes on its way.'
run 'mkdir snap/here && echo "one from here" > fork && echo "two from here" > fork'
run "cd ../one && echo run > state && echo echo I am the first > console && sed '/^I am/q' console" 'I am the first'
run "cd ../two && echo run > state && echo echo I am the second > console && sed '/^I am/q' console" 'I am the second'
run "cd ../pc && cat state && du -sh --apparent-size snap/here/state" 'paused'

say 'And gdb, with the kernel'"'"'s own symbols.'
run "gdb -q -batch symbols.elf -ex 'target remote | vmfs gdb .' -ex 'bt 3' -ex 'x/2i \$pc' 2>&1 | tail -n 5" 'x64_sys'

run "cd $vmfs && rmdir one two pc" '^$'
