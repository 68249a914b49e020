/* SPDX-License-Identifier: MIT */
/*
 * The guest of the failover tests: 64 KiB of ROM that count on a disk.
 *
 * On the primary IDE disk, sectors of 512 bytes:
 *   1        the head: the last number taken
 *   64 + n   the log: that number n was written, and by whom
 * A sector holds "HWERRCNT", the number (32 bits) and, from byte 16 on, the UUID of the
 * QEMU that wrote it. Each number is taken in the head and flushed before it is written to
 * the log and flushed, so no number is ever used twice, whenever a writer ends: what the
 * disk's server saw written must grow from one log sector to the next.
 *
 * Between two numbers it sleeps until the timer ticks, 18 times a second.
 *
 * The debug console is told: R it runs, W the first number is on disk, E the disk failed.
 */

	.code16
	.set	debugcon, 0xe9
	.set	fw_cfg, 0x510
	.set	counter, 0x500		/* for who looks from outside */
	.set	said, 0x504
	.set	out_buf, 0x1000
	.set	in_buf, 0x2000
	.set	head, 1
	.set	log, 64

	.globl	_start
_start:
	cli
	cld
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x7000, %sp
	movb	$'R', %al
	outb	%al, $debugcon

	/* docs/specs/fw_cfg.txt: item 2 is the UUID. */
	movw	$fw_cfg, %dx
	movw	$2, %ax
	outw	%ax, %dx
	incw	%dx
	movw	$(out_buf + 16), %di
	movw	$16, %cx
1:	inb	%dx, %al
	stosb
	loop	1b
	movl	$0x52455748, out_buf	/* HWER */
	movl	$0x544e4352, out_buf + 4	/* RCNT */

	movl	$head, %eax
	movb	$0x20, %cl		/* READ SECTORS */
	call	command
	call	ready
	movw	$0x1f0, %dx
	movw	$in_buf, %di
	movw	$256, %cx
	rep insw
	movl	in_buf + 8, %ebx	/* of an empty disk: 0 */

	movb	$0, said

	/* With its local APIC off, KVM's CPU hears the PIC: IRQ 0 alone, as interrupt 8, and nobody has to end it. */
	movl	$0x1b, %ecx
	rdmsr
	andw	$0xf7ff, %ax
	wrmsr
	movw	$tick, 8 * 4
	movw	%cs, 8 * 4 + 2
	movb	$0x11, %al
	outb	%al, $0x20
	movb	$8, %al
	outb	%al, $0x21
	movb	$4, %al
	outb	%al, $0x21
	movb	$3, %al
	outb	%al, $0x21
	movb	$0xfe, %al
	outb	%al, $0x21
	movb	$0xff, %al
	outb	%al, $0xa1
	movb	$0x34, %al
	outb	%al, $0x43
	movb	$0xff, %al
	outb	%al, $0x40
	outb	%al, $0x40
next:
	sti
	hlt
	cli
	incl	%ebx
	movl	%ebx, out_buf + 8
	movl	$head, %eax
	call	write
	leal	log(%ebx), %eax
	call	write
	movl	%ebx, counter
	cmpb	$1, said
	je	next
	movb	$1, said
	movb	$'W', %al
	outb	%al, $debugcon
	jmp	next

/* Sector %eax from out_buf, durably. */
write:
	movb	$0x30, %cl		/* WRITE SECTORS */
	call	command
	call	ready
	movw	$0x1f0, %dx
	movw	$out_buf, %si
	movw	$256, %cx
	rep outsw
	call	idle
	movw	$0x1f7, %dx
	movb	$0xe7, %al		/* FLUSH CACHE */
	outb	%al, %dx
	jmp	idle

/* Command %cl for sector %eax. */
command:
	pushl	%eax
	call	idle
	popl	%eax
	pushl	%eax
	shrl	$24, %eax
	orb	$0xe0, %al		/* LBA, first disk */
	movw	$0x1f6, %dx
	outb	%al, %dx
	movw	$0x1f2, %dx
	movb	$1, %al
	outb	%al, %dx
	popl	%eax
	incw	%dx
	outb	%al, %dx
	shrl	$8, %eax
	incw	%dx
	outb	%al, %dx
	shrl	$8, %eax
	incw	%dx
	outb	%al, %dx
	movw	$0x1f7, %dx
	movb	%cl, %al
	outb	%al, %dx
	ret

/* Waits until the disk is not busy, and for `ready` until it wants data. */
idle:
	movw	$0x1f7, %dx
1:	inb	%dx, %al
	testb	$0x80, %al
	jnz	1b
	testb	$0x21, %al		/* device fault, error */
	jnz	failed
	ret
ready:
	call	idle
	testb	$0x08, %al
	jz	ready
	ret

tick:
	iret

failed:
	movb	$'E', %al
	outb	%al, $debugcon
1:	hlt
	jmp	1b

	/* The CPU starts at the last 16 bytes. */
	.org	0xfff0
	ljmp	$0xf000, $_start
	.org	0x10000
