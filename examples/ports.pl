#!/usr/bin/perl
# ports.pl MOUNT: a device in Perl. The guest reads a line from it and writes it back in capitals.
#
# An exit is the 64 bytes of struct vmfs_exit, which unpack takes apart. The descriptors stay open: one runs
# the guest, one answers it.
use strict;
use warnings;
use Fcntl qw(O_RDONLY O_WRONLY);

use constant { CODE => 0x1000, IN => 0, HLT => 5, IO => 2 };

my $mount = shift // die "usage: ports.pl MOUNT\n";
my $vm = "$mount/ports.$$";
mkdir $vm or die "$vm: $!\n";
END { rmdir $vm if defined $vm }

sub file {
    my ($name, $flags) = @_;
    sysopen my $file, "$vm/$name", $flags or die "$name: $!\n";
    return $file;
}

sub put {
    my ($file, $data, $offset) = @_;
    sysseek $file, $offset // 0, 0;
    my $done = syswrite $file, $data;
    die "cannot write: $!\n" unless defined $done && $done == length $data;
}

my $guest = join '', qw(
    e410 84c0 740e
    3c61 7206 3c7a 7702 2c20
    e610 ebec f4
);  # in al, 0x10; test al, al; jz end;  cmp al, "a"; jb write; cmp al, "z"; ja write; sub al, 32;
    # write: out 0x10, al; jmp CODE; end: hlt
put file('mode', O_WRONLY), 'real';
put file('mem', O_WRONLY), pack('H*', $guest), CODE;
put file('registers', O_WRONLY), sprintf 'rip %#x', CODE;

my @typed = split //, "Every vm is a directory.\0";
my $written = '';
my %ports = (
    0x10 => {
        in => sub { shift @typed },
        out => sub { $written .= shift },
    },
);

my $run = file('vm_run.bin', O_RDONLY);
my $answer = file('exit.data', O_WRONLY);
my %exits;
while (1) {
    sysseek $run, 0, 0;
    my $size = sysread $run, my $exit, 64;
    die "vm_run.bin: $!\n" unless defined $size && $size == 64;
    my ($reason, $cpu, $rip, $direction, $bytes, $port, $count, $data) = unpack 'L L Q C C S L a40', $exit;
    $exits{$reason}++;
    last if $reason == HLT;
    die sprintf "exit %d at %#x\n", $reason, $rip unless $reason == IO;
    my $device = $ports{$port} // die sprintf "nothing is at port %#x\n", $port;
    if ($direction == IN) {
        put $answer, $device->{in}->();
    } else {
        $device->{out}->(substr $data, 0, $bytes * $count);
    }
}
print "the guest wrote: $written\n";
printf "exits: %s\n", join ', ', map { "$exits{$_} of reason $_" } sort { $a <=> $b } keys %exits;

die "that is wrong\n" unless $written eq 'EVERY VM IS A DIRECTORY.' && !@typed && $exits{+IO} == 2 * 24 + 1;
