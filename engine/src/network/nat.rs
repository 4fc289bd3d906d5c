//! nftables rules: guests reach out through the host's address, and nothing unasked reaches in.

use std::borrow::Cow;
use std::io::Write;
use std::process::{Command, Stdio};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nftables::batch::Batch;
use nftables::expr::{
    CT, Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix,
};
use nftables::schema::{Chain, NfListObject, Nftables, Rule, Table};
use nftables::stmt::{Accept, Drop, Match, Operator, Statement};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook};

use super::{BRIDGE, NetworkError, Subnet};

/// Our one table, in the `ip` family.
const TABLE: &str = "vmrun";
/// Priorities as nft's names `filter` and `srcnat` give them.
const FILTER: i32 = 0;
const SRCNAT: i32 = 100;

/// Installs the table where the kernel does not have it. The kernel is asked each time, because
/// what reloads a host's firewall often flushes everyone's rules.
pub fn ensure(subnet: &Subnet) -> Result<(), NetworkError> {
    if table_exists().unwrap_or(false) {
        return Ok(());
    }
    apply(&ruleset(subnet))
}

/// Has `nft` install rules. (The crate's own way leaves nft's messages to the terminal.)
fn apply(ruleset: &Nftables<'_>) -> Result<(), NetworkError> {
    let failed = |error: &dyn std::fmt::Display| NetworkError::Nft(error.to_string());
    let text = serde_json::to_vec(ruleset).map_err(|error| failed(&error))?;
    let mut nft = Command::new("nft")
        .args(["-j", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(NetworkError::NftMissing)?;
    // Where it ends before it has read all, it says why.
    let _ = nft.stdin.take().map(|mut stdin| stdin.write_all(&text));
    let output = nft.wait_with_output().map_err(|error| failed(&error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let line = said.lines().find(|line| line.contains("Error"));
    Err(failed(&line.unwrap_or("no reason given")))
}

/// Asks the kernel for our table (`NFT_MSG_GETTABLE`): one message each way, where `nft` costs a
/// process on the way to every start.
fn table_exists() -> std::io::Result<bool> {
    const HEADER: usize = 16;
    /// Attribute of the table's name (linux/netfilter/nf_tables.h), which libc lacks.
    const NFTA_TABLE_NAME: u16 = 1;
    let name_attribute = TABLE.len() + 1 + 4;
    let length = HEADER + 4 + name_attribute.next_multiple_of(4);
    let mut request = Vec::with_capacity(length);
    request.extend_from_slice(&(length as u32).to_ne_bytes());
    let kind = ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | libc::NFT_MSG_GETTABLE as u16;
    request.extend_from_slice(&kind.to_ne_bytes());
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    request.extend_from_slice(&flags.to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence, port
    request.extend_from_slice(&[libc::NFPROTO_IPV4 as u8, libc::NFNETLINK_V0 as u8, 0, 0]);
    request.extend_from_slice(&(name_attribute as u16).to_ne_bytes());
    request.extend_from_slice(&NFTA_TABLE_NAME.to_ne_bytes());
    request.extend_from_slice(TABLE.as_bytes());
    request.resize(length, 0);

    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request, 0)?;
    let (reply, _) = socket.recv_from_full()?;
    let kind = reply.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let expected = ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | libc::NFT_MSG_NEWTABLE as u16;
    Ok(kind == Some(expected))
}

/// The table as one transaction, whatever state it was in.
fn ruleset(subnet: &Subnet) -> Nftables<'static> {
    let table = || {
        NfListObject::Table(Table {
            family: NfFamily::IP,
            name: Cow::Borrowed(TABLE),
            handle: None,
        })
    };
    let mut batch = Batch::new();
    // Deleting what does not exist is an error; adding what does is none.
    batch.add(table());
    batch.delete(table());
    batch.add(table());

    batch.add(base_chain("postrouting", NfChainType::NAT, NfHook::Postrouting, SRCNAT));
    batch.add(rule(
        "postrouting",
        vec![
            compare(source_address(), Operator::EQ, network(subnet)),
            compare(interface(MetaKey::Oifname), Operator::NEQ, bridge()),
            Statement::Masquerade(None),
        ],
    ));

    batch.add(base_chain("forward", NfChainType::Filter, NfHook::Forward, FILTER));
    // An address of another network in a guest's packet is a forgery.
    batch.add(rule(
        "forward",
        vec![
            compare(interface(MetaKey::Iifname), Operator::EQ, bridge()),
            compare(source_address(), Operator::NEQ, network(subnet)),
            Statement::Drop(Some(Drop {})),
        ],
    ));
    batch.add(rule(
        "forward",
        vec![
            compare(interface(MetaKey::Iifname), Operator::EQ, bridge()),
            Statement::Accept(Some(Accept {})),
        ],
    ));
    batch.add(rule(
        "forward",
        vec![
            compare(interface(MetaKey::Oifname), Operator::EQ, bridge()),
            compare(connection_state(), Operator::IN, known_connections()),
            Statement::Accept(Some(Accept {})),
        ],
    ));
    batch.add(rule(
        "forward",
        vec![
            compare(interface(MetaKey::Oifname), Operator::EQ, bridge()),
            Statement::Drop(Some(Drop {})),
        ],
    ));
    batch.to_nftables()
}

fn base_chain(
    name: &'static str,
    kind: NfChainType,
    hook: NfHook,
    priority: i32,
) -> NfListObject<'static> {
    NfListObject::Chain(Chain {
        family: NfFamily::IP,
        table: Cow::Borrowed(TABLE),
        name: Cow::Borrowed(name),
        _type: Some(kind),
        hook: Some(hook),
        prio: Some(priority),
        policy: Some(NfChainPolicy::Accept),
        ..Chain::default()
    })
}

fn rule(chain: &'static str, statements: Vec<Statement<'static>>) -> NfListObject<'static> {
    NfListObject::Rule(Rule {
        family: NfFamily::IP,
        table: Cow::Borrowed(TABLE),
        chain: Cow::Borrowed(chain),
        expr: Cow::Owned(statements),
        ..Rule::default()
    })
}

fn compare(
    left: Expression<'static>,
    op: Operator,
    right: Expression<'static>,
) -> Statement<'static> {
    Statement::Match(Match { left, right, op })
}

fn interface(key: MetaKey) -> Expression<'static> {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

fn bridge() -> Expression<'static> {
    Expression::String(Cow::Borrowed(BRIDGE))
}

fn source_address() -> Expression<'static> {
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(PayloadField {
        protocol: Cow::Borrowed("ip"),
        field: Cow::Borrowed("saddr"),
    })))
}

fn network(subnet: &Subnet) -> Expression<'static> {
    let address = Expression::String(Cow::Owned(subnet.network().to_string()));
    Expression::Named(NamedExpression::Prefix(Prefix {
        addr: Box::new(address),
        len: subnet.prefix().into(),
    }))
}

fn connection_state() -> Expression<'static> {
    Expression::Named(NamedExpression::CT(CT {
        key: Cow::Borrowed("state"),
        family: None,
        dir: None,
    }))
}

fn known_connections() -> Expression<'static> {
    Expression::List(vec![
        Expression::String(Cow::Borrowed("established")),
        Expression::String(Cow::Borrowed("related")),
    ])
}
