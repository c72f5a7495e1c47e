//! Values that go out to clients and come back, and must be ours, unread and unchanged.
//!
//! A client may send anything back. What it cannot do is make a text that opens, or use one for something other than
//! it was sealed for: what a text is bound to (principal, method, arguments …) goes into its authentication.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chacha20poly1305::{
    Key, KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};

const NONCE: usize = 24;
const ID: usize = 6;

/// A key, and the texts sealed with it (XChaCha20-Poly1305).
#[derive(Clone)]
pub(crate) struct Seal {
    cipher: XChaCha20Poly1305,
    /// Names the key, so that another gateway's texts are told from forged ones.
    id: String,
}

/// Why a text does not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Nothing that this key has sealed.
    Foreign,
    /// It says it is ours and was changed, or is bound to something else.
    Forged,
}

impl Seal {
    /// A key of its own, which is gone with the process.
    pub(crate) fn random() -> Self {
        let mut key = [0; 32];
        getrandom::fill(&mut key).expect("the system has random numbers");
        Self::with_key(key)
    }

    /// This key: what it sealed before a restart opens after it.
    pub(crate) fn with_key(key: [u8; 32]) -> Self {
        let cipher = XChaCha20Poly1305::new(&Key::from(key));
        let name = cipher.encrypt(&XNonce::from([0; NONCE]), &[0; ID][..]).expect("six bytes can be sealed");
        Seal { cipher, id: URL_SAFE_NO_PAD.encode(&name[..ID]) }
    }

    /// Seals, bound to all of `to`. The outcome is URL-safe ASCII.
    pub(crate) fn close(&self, plain: &[u8], to: &[&[u8]]) -> String {
        let mut nonce = [0; NONCE];
        getrandom::fill(&mut nonce).expect("the system has random numbers");
        let payload = Payload { msg: plain, aad: &bound(to) };
        let sealed = self.cipher.encrypt(&XNonce::from(nonce), payload).expect("it is short");
        format!("{}.{}", self.id, URL_SAFE_NO_PAD.encode([&nonce[..], &sealed].concat()))
    }

    /// Opens what was sealed, bound to the same.
    pub(crate) fn open(&self, text: &str, to: &[&[u8]]) -> Result<Vec<u8>, Broken> {
        let sealed = text.strip_prefix(&*self.id).and_then(|rest| rest.strip_prefix('.'));
        let sealed = URL_SAFE_NO_PAD.decode(sealed.ok_or(Broken::Foreign)?).map_err(|_| Broken::Forged)?;
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE>().ok_or(Broken::Forged)?;
        let payload = Payload { msg: sealed, aad: &bound(to) };
        self.cipher.decrypt(&XNonce::from(*nonce), payload).map_err(|_| Broken::Forged)
    }
}

/// All parts as one, so that no two lists of parts are the same bytes.
fn bound(parts: &[&[u8]]) -> Vec<u8> {
    parts.iter().flat_map(|part| [&(part.len() as u64).to_le_bytes()[..], part].concat()).collect()
}

/// The key stays in here.
impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_knows_its_own_again_and_no_others() {
        let (a, again, b) = (Seal::with_key([7; 32]), Seal::with_key([7; 32]), Seal::random());
        let sealed = a.close(b"x", &[b"alice"]);
        assert_eq!(again.open(&sealed, &[b"alice"]), Ok(b"x".to_vec()));
        assert_eq!(b.open(&sealed, &[b"alice"]), Err(Broken::Foreign));
        assert_eq!(a.open("", &[]), Err(Broken::Foreign));
        assert_eq!(a.open(&format!("{}.", a.id), &[]), Err(Broken::Forged));
    }

    proptest! {
        #[test]
        fn it_opens_for_what_it_was_sealed_for_only(
            plain in any::<Vec<u8>>(),
            to in prop::collection::vec(any::<Vec<u8>>(), 0..4),
            other in prop::collection::vec(any::<Vec<u8>>(), 0..4),
            at in any::<prop::sample::Index>(),
        ) {
            let seal = Seal::random();
            let (to, other): (Vec<&[u8]>, Vec<&[u8]>) =
                (to.iter().map(Vec::as_slice).collect(), other.iter().map(Vec::as_slice).collect());
            let sealed = seal.close(&plain, &to);
            prop_assert_eq!(seal.open(&sealed, &to), Ok(plain));
            prop_assert_eq!(to == other, seal.open(&sealed, &other).is_ok());
            let mut changed = sealed.clone().into_bytes();
            let at = at.index(changed.len());
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            prop_assert!(seal.open(std::str::from_utf8(&changed).unwrap(), &to).is_err());
        }
    }
}
