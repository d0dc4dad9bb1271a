# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# The boot sector of a disk that a guest boots from: it loads Linux with the firmware's own disk services, so that what
# is read goes through the firmware's virtio driver. images.py lays out the disk and fills in `areas`; everything that
# the kernel wants to be told stands in the kernel's header on the disk already.
#
# In chunks of 64 sectors from sector 64 on: two with the kernel's real-mode part and its command line, for 0x10000; then
# those of each area, for the address given there (the protected-mode kernel, the initramfs).
#
#   as --32 -o boot.o boot.S && ld -m elf_i386 -Ttext 0x7c00 -e start --oformat binary -o boot.bin boot.o
#
# images.py holds the result, so that no assembler is needed; tests/test_guest_vfio.py compares the two.

	.code16
	.globl start
start:
	cli
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp
	sti
	cld
	movb %dl, drive

	movw $0x1000, segment
	call read
	movw $0x1800, segment
	call read

	movw $0x2000, segment
	movw $areas, %di
area:
	movw 4(%di), %cx
	jcxz boot
	movw (%di), %ax
	movw %ax, to + 2
	movw 2(%di), %ax
	movb %al, to + 4
	movb %ah, to + 7
chunk:
	pushw %cx
	call read
	movb $0x87, %ah
	movw $0x4000, %cx
	movw $gdt, %si
	int $0x15
	jc failed
	addw $0x8000, to + 2
	adcb $0, to + 4
	adcb $0, to + 7
	popw %cx
	loop chunk
	addw $6, %di
	jmp area

boot:
	cli
	movw $0x1000, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %fs
	movw %ax, %gs
	movw %ax, %ss
	movw $0xe000, %sp
	ljmp $0x1020, $0

read:
	movw $packet, %si
	movb $0x42, %ah
	movb drive, %dl
	int $0x13
	jc failed
	addw $64, sector
	adcw $0, sector + 2
	ret

failed:
	movw $text, %si
1:	lodsb
	testb %al, %al
	jz 2f
	movb $0x0e, %ah
	movw $7, %bx
	int $0x10
	jmp 1b
2:	hlt
	jmp 2b

text:	.asciz "cannot read the kernel\r\n"
drive:	.byte 0

	# INT 13h, AH 42h: 64 sectors to segment:0
	.balign 4
packet:	.byte 16, 0
	.word 64, 0
segment:
	.word 0
sector:	.long 64, 0

	# INT 15h, AH 87h: from 0x20000 to the address wanted
gdt:	.fill 16, 1, 0
	.word 0xffff, 0
	.byte 2, 0x93, 0, 0
to:	.word 0xffff, 0
	.byte 0, 0x93, 0, 0
	.fill 16, 1, 0

	# Address and number of chunks of up to four areas; 0 chunks end the list.
	.org start + 408
areas:	.fill 30, 1, 0

	# An empty partition table.
	.org start + 446
	.fill 64, 1, 0
	.byte 0x55, 0xaa
