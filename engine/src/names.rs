//! Names for containers whose user has given none.

const FIRST: [&str; 32] = [
    "agile", "amber", "ample", "brisk", "calm", "clear", "crisp", "deft", "eager", "early", "fair",
    "fleet", "fresh", "gentle", "glad", "hardy", "keen", "kind", "light", "lively", "merry",
    "mild", "neat", "noble", "plain", "quiet", "ready", "sharp", "still", "swift", "warm", "wise",
];
const SECOND: [&str; 32] = [
    "badger", "beaver", "bison", "crane", "curlew", "dove", "eider", "elk", "falcon", "finch",
    "fox", "grouse", "hare", "heron", "ibex", "kite", "lark", "lynx", "marten", "newt", "otter",
    "owl", "plover", "raven", "robin", "seal", "shrew", "stoat", "swan", "tern", "vole", "wren",
];

/// Two words and a number: about a million of them.
pub fn random() -> std::io::Result<String> {
    let mut bytes = [0; 4];
    crate::random::fill(&mut bytes)?;
    let [first, second, low, high] = bytes;
    let word = |words: &[&'static str; 32], byte: u8| words[usize::from(byte % 32)];
    let number = u16::from_le_bytes([low, high]) % 1000;
    Ok(format!("{}_{}{number}", word(&FIRST, first), word(&SECOND, second)))
}
