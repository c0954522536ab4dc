//! Byte copies between private memory and memory that another process may be writing.
//!
//! A plain `memcpy` from racing memory is undefined: the compiler may read twice, or assume that
//! what it read stays. Here the bytes move by an instruction that it cannot look into, or by
//! volatile accesses.

/// Copies `length` bytes out of shared memory.
///
/// # Safety
/// `private` must be valid for writes of `length` bytes that nobody else accesses, `shared` must
/// lead to `length` mapped readable bytes, and the two must not overlap.
#[inline]
pub unsafe fn copy_from_shared(private: *mut u8, shared: *const u8, length: usize) {
    // SAFETY: passed on to the caller.
    unsafe { copy_opaque(private, shared, length) }
}

/// Copies `length` bytes into shared memory.
///
/// # Safety
/// `shared` must lead to `length` mapped writable bytes, `private` must be valid for reads of
/// `length` bytes that nobody writes meanwhile, and the two must not overlap.
#[inline]
pub unsafe fn copy_to_shared(shared: *mut u8, private: *const u8, length: usize) {
    // SAFETY: passed on to the caller.
    unsafe { copy_opaque(shared, private, length) }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
unsafe fn copy_opaque(target: *mut u8, source: *const u8, length: usize) {
    // SAFETY: reads and writes exactly the two ranges the caller vouched for; the direction flag is
    // clear by the calling convention. To the compiler this is one opaque memory operation.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") length => _,
            inout("rdi") target => _,
            inout("rsi") source => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
#[inline]
unsafe fn copy_opaque(target: *mut u8, source: *const u8, length: usize) {
    // SAFETY: passed on to the caller.
    unsafe { copy_volatile(target, source, length) }
}

/// The portable copy: whole words where both sides are aligned alike, bytes elsewhere.
#[cfg(any(test, not(all(target_arch = "x86_64", not(miri)))))]
unsafe fn copy_volatile(target: *mut u8, source: *const u8, length: usize) {
    const WORD: usize = size_of::<u64>();
    let mut done = 0;
    let alike = (target.addr() ^ source.addr()).is_multiple_of(WORD);
    while done < length {
        let word = alike && length - done >= WORD && (source.addr() + done).is_multiple_of(WORD);
        // SAFETY: `done` (plus a word where a word is moved) is within the two ranges the caller
        // vouched for, and a word is moved only where both addresses are aligned for it.
        unsafe {
            if word {
                let value = source.add(done).cast::<u64>().read_volatile();
                target.add(done).cast::<u64>().write_volatile(value);
            } else {
                target
                    .add(done)
                    .write_volatile(source.add(done).read_volatile());
            }
        }
        done += if word { WORD } else { 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every length and misalignment up to a few words, with guard bytes around the target.
    fn moves_exactly_the_range(copy: unsafe fn(*mut u8, *const u8, usize)) {
        let source: Vec<u8> = (0..64).collect();
        for source_at in 0..9 {
            for target_at in 1..9 {
                for length in 0..40 {
                    let mut target = [0xEE_u8; 64];
                    // SAFETY: both ranges lie inside their arrays of 64 bytes.
                    unsafe {
                        copy(
                            target.as_mut_ptr().add(target_at),
                            source.as_ptr().add(source_at),
                            length,
                        );
                    }
                    let end = target_at + length;
                    assert_eq!(
                        target[target_at..end],
                        source[source_at..source_at + length]
                    );
                    assert!(target[..target_at].iter().all(|byte| *byte == 0xEE));
                    assert!(target[end..].iter().all(|byte| *byte == 0xEE));
                }
            }
        }
    }

    #[test]
    fn opaque_copy_moves_exactly_the_range() {
        moves_exactly_the_range(copy_from_shared);
        moves_exactly_the_range(copy_to_shared);
    }

    #[test]
    fn volatile_copy_moves_exactly_the_range() {
        moves_exactly_the_range(copy_volatile);
    }
}
