//! Session tokens.
//!
//! A token is when it expires, encrypted and authenticated (ChaCha20-Poly1305, RFC 8439) under a key
//! that only this process has and that is nowhere stored. So none can be forged, none has to be
//! remembered, and those of another process, or of this machine before it was restored from a
//! snapshot, are void.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chacha20poly1305::aead::Aead as _;
use chacha20poly1305::{ChaCha20Poly1305, Key, KeyInit as _, Nonce};

/// The longest life of a token, in seconds: 6 hours.
pub const MAX_TTL_SECONDS: u32 = 21600;
/// The shortest, in seconds.
pub const MIN_TTL_SECONDS: u32 = 1;

/// Of a token, before it is text: which one it is, and when it expires with a tag of 16 bytes.
const ID: usize = 8;
const SEALED: usize = 8 + 16;

/// Why there is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Asked to live too short or too long. The text is Firecracker's.
    #[error(
        "Invalid time to live value provided for token: {0}. \
         Please provide a value between {MIN_TTL_SECONDS} and {MAX_TTL_SECONDS}."
    )]
    Ttl(u32),
    /// The system has no random numbers for a key.
    #[error("cannot make a key for session tokens: {0}")]
    Random(#[from] rustix::io::Errno),
    /// The token cannot be encrypted.
    #[error("cannot encrypt a session token")]
    Encryption,
}

/// Issues tokens and knows its own again.
pub struct TokenAuthority {
    cipher: ChaCha20Poly1305,
    /// Tokens issued under this key. The next one's number is its nonce, so that none is used twice.
    issued: u64,
}

impl TokenAuthority {
    /// An authority with a new key.
    pub fn new() -> Result<TokenAuthority, TokenError> {
        let mut key = Key::default();
        crate::random::fill(&mut key)?;
        Ok(TokenAuthority { cipher: ChaCha20Poly1305::new(&key), issued: 0 })
    }

    /// A token that is valid for so many seconds from `now` on, which is counted from any fixed
    /// point. It is text that can stand in a header.
    pub fn issue(&mut self, ttl_seconds: u32, now: Duration) -> Result<String, TokenError> {
        if !(MIN_TTL_SECONDS..=MAX_TTL_SECONDS).contains(&ttl_seconds) {
            return Err(TokenError::Ttl(ttl_seconds));
        }
        if self.issued == u64::MAX {
            // No numbers are left. A new key makes all good again, and the old tokens void.
            *self = TokenAuthority::new()?;
        }
        let id = self.issued.to_le_bytes();
        self.issued += 1;
        let expiry = milliseconds(now).saturating_add(u64::from(ttl_seconds) * 1000);
        let sealed = self.cipher.encrypt(&nonce(id), expiry.to_le_bytes().as_slice());
        let sealed = sealed.map_err(|_| TokenError::Encryption)?;
        Ok(URL_SAFE_NO_PAD.encode([&id, sealed.as_slice()].concat()))
    }

    /// Whether this is a token of this authority that has not expired.
    pub fn is_valid(&self, token: &[u8], now: Duration) -> bool {
        self.expiry(token).is_some_and(|expiry| milliseconds(now) < expiry)
    }

    fn expiry(&self, token: &[u8]) -> Option<u64> {
        let mut bytes = [0; ID + SEALED];
        // Longer ones are refused before anything of them is decoded.
        if URL_SAFE_NO_PAD.decode_slice(token, &mut bytes).ok()? != bytes.len() {
            return None;
        }
        let (id, sealed) = bytes.split_first_chunk::<ID>()?;
        let expiry = self.cipher.decrypt(&nonce(*id), sealed).ok()?;
        Some(u64::from_le_bytes(expiry.try_into().ok()?))
    }
}

fn nonce(id: [u8; ID]) -> Nonce {
    let mut nonce = Nonce::default();
    nonce[..ID].copy_from_slice(&id);
    nonce
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    fn later(milliseconds: u64) -> Duration {
        NOW + Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_token_is_valid_until_it_expires() {
        let mut authority = TokenAuthority::new().unwrap();
        let token = authority.issue(60, NOW).unwrap();
        assert!(authority.is_valid(token.as_bytes(), NOW));
        assert!(authority.is_valid(token.as_bytes(), later(59_999)));
        assert!(!authority.is_valid(token.as_bytes(), later(60_000)));
    }

    #[test]
    fn tokens_live_from_a_second_to_six_hours() {
        let mut authority = TokenAuthority::new().unwrap();
        assert!(authority.issue(1, NOW).is_ok());
        assert!(authority.issue(21600, NOW).is_ok());
        let error = authority.issue(21601, NOW).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Invalid time to live value provided for token: 21601. \
             Please provide a value between 1 and 21600."
        );
        assert_eq!(authority.issue(0, NOW), Err(TokenError::Ttl(0)));
    }

    #[test]
    fn no_two_tokens_are_equal() {
        let mut authority = TokenAuthority::new().unwrap();
        assert_ne!(authority.issue(60, NOW).unwrap(), authority.issue(60, NOW).unwrap());
    }

    #[test]
    fn a_token_of_another_authority_is_invalid() {
        let token = TokenAuthority::new().unwrap().issue(60, NOW).unwrap();
        assert!(!TokenAuthority::new().unwrap().is_valid(token.as_bytes(), NOW));
    }

    #[test]
    fn a_token_changed_in_any_place_is_invalid() {
        let mut authority = TokenAuthority::new().unwrap();
        let token = authority.issue(60, NOW).unwrap();
        let bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(!authority.is_valid(URL_SAFE_NO_PAD.encode(changed).as_bytes(), NOW), "{bit}");
        }
    }

    #[test]
    fn other_texts_are_no_tokens() {
        let mut authority = TokenAuthority::new().unwrap();
        let token = authority.issue(60, NOW).unwrap();
        let others = ["", "foo", "\u{e9}", &token[1..], &format!("{token}A"), &token.repeat(50)];
        for other in others {
            assert!(!authority.is_valid(other.as_bytes(), NOW), "{other}");
        }
        assert!(!authority.is_valid(&[0xff; 43], NOW));
    }

    #[test]
    fn when_the_numbers_are_used_up_a_new_key_is_made() {
        let mut authority = TokenAuthority::new().unwrap();
        let old = authority.issue(60, NOW).unwrap();
        authority.issued = u64::MAX;
        let new = authority.issue(60, NOW).unwrap();
        assert!(authority.is_valid(new.as_bytes(), NOW));
        assert!(!authority.is_valid(old.as_bytes(), NOW));
    }
}
