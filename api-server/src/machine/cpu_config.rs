//! A custom CPU template: what the guest's processors have beside, or less than, the host's.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Changes of CPUID and of model-specific registers, on top of what the monitor sets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// KVM capabilities that must be there (`"121"`), or are not looked at (`"!121"`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID leaves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of model-specific registers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Changes of one CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf (EAX).
    pub leaf: Number,
    /// The subleaf (ECX).
    pub subleaf: Number,
    /// KVM's flags of the entry (`KVM_CPUID_FLAG_*`).
    pub flags: u32,
    /// Changes of its registers.
    pub modifiers: Vec<RegisterModifier>,
}

/// Changes of one register of a CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which register.
    pub register: CpuidRegister,
    /// The bits to set and to clear.
    pub bitmap: Bitmap<32>,
}

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are the processor's")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes of one model-specific register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its index.
    pub addr: Number,
    /// The bits to set and to clear.
    pub bitmap: Bitmap<64>,
}

/// A number written `"0x…"`, `"0b…"` or in decimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number(pub u32);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => (digits, 16),
            (_, Some(digits)) => (digits, 2),
            _ => (text.as_str(), 10),
        };
        // from_str_radix would take a sign.
        if !digits.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(D::Error::custom(format!("{text:?} is not a number")));
        }
        u32::from_str_radix(digits, radix)
            .map(Number)
            .map_err(|error| D::Error::custom(format!("{text:?} is not a number: {error}")))
    }
}

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

/// Bits of a register of so many bits: written `"0b"` and for each bit, the highest first, `0` to
/// clear it, `1` to set it or `x` to leave it. Underscores have no meaning. Bits that are not
/// written are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap<const BITS: u32> {
    /// Bits that change.
    pub mask: u64,
    /// Their values.
    pub value: u64,
}

impl<const BITS: u32> Bitmap<BITS> {
    /// The register's contents after the change.
    pub fn apply(&self, register: u64) -> u64 {
        (register & !self.mask) | self.value
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = |why: &str| D::Error::custom(format!("bitmap {text:?}: {why}"));
        let digits = text.strip_prefix("0b").ok_or_else(|| wrong("does not begin with 0b"))?;
        let (mut mask, mut value, mut count) = (0u64, 0u64, 0);
        for digit in digits.bytes().filter(|byte| *byte != b'_') {
            let (changes, bit) = match digit {
                b'0' => (1, 0),
                b'1' => (1, 1),
                b'x' => (0, 0),
                _ => return Err(wrong("has a digit that is not 0, 1 or x")),
            };
            (mask, value, count) = (mask << 1 | changes, value << 1 | bit, count + 1);
            if count > BITS {
                return Err(wrong("is longer than the register"));
            }
        }
        if count == 0 {
            return Err(wrong("is empty"));
        }
        Ok(Bitmap { mask, value })
    }
}

impl<const BITS: u32> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::from("0b");
        for bit in (0..BITS).rev() {
            text.push(match (self.mask >> bit & 1, self.value >> bit & 1) {
                (0, _) => 'x',
                (_, 0) => '0',
                _ => '1',
            });
        }
        serializer.serialize_str(&text)
    }
}

/// A KVM capability by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmCapability {
    /// `KVM_CAP_*`
    pub number: u32,
    /// Whether it must be there.
    pub required: bool,
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (digits, required) = match text.strip_prefix('!') {
            Some(digits) => (digits, false),
            None => (text.as_str(), true),
        };
        match digits.parse() {
            Ok(number) => Ok(KvmCapability { number, required }),
            Err(error) => Err(D::Error::custom(format!("KVM capability {text:?}: {error}"))),
        }
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let sign = if self.required { "" } else { "!" };
        serializer.collect_str(&format_args!("{sign}{}", self.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_set_and_clear_and_come_back_as_they_were() {
        let bitmap: Bitmap<32> = serde_json::from_str(r#""0b1x_0""#).unwrap();
        assert_eq!(bitmap.apply(0b011), 0b110);
        let text = serde_json::to_string(&bitmap).unwrap();
        assert_eq!(text, format!("\"0b{}1x0\"", "x".repeat(29)));
        assert_eq!(serde_json::from_str::<Bitmap<32>>(&text).unwrap(), bitmap);
        for wrong in ["", "0b", "1x0", "0b2", "0b111111111111111111111111111111111"] {
            assert!(serde_json::from_value::<Bitmap<32>>(wrong.into()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_and_capabilities_are_read_in_each_notation() {
        for (text, value) in [("0x1F", 31), ("0b101", 5), ("17", 17)] {
            assert_eq!(serde_json::from_value::<Number>(text.into()).unwrap(), Number(value));
        }
        for wrong in ["", "0x", "-1", "0x-1", "4294967296", "1_0"] {
            assert!(serde_json::from_value::<Number>(wrong.into()).is_err(), "{wrong}");
        }
        let capability: KvmCapability = serde_json::from_str(r#""!121""#).unwrap();
        assert_eq!(capability, KvmCapability { number: 121, required: false });
        assert_eq!(serde_json::to_string(&capability).unwrap(), r#""!121""#);
    }
}
