//! Who a process runs as: names looked up in the image's own passwd and group.

use std::fs;

use crate::error::SetupError;

/// The ids of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

/// Resolves `USER[:GROUP]`, each by name or number, as container engines do. A number that is no
/// user of the image is taken as it is, with group 0.
pub fn resolve(user: &str, extra: &[String]) -> Result<Identity, SetupError> {
    // An image without these files has only numbers.
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let group = fs::read("/etc/group").unwrap_or_default();
    resolve_in(&String::from_utf8_lossy(&passwd), &String::from_utf8_lossy(&group), user, extra)
}

fn resolve_in(
    passwd: &str,
    group: &str,
    user: &str,
    extra: &[String],
) -> Result<Identity, SetupError> {
    let users: Vec<User> = passwd.lines().filter_map(parse_user).collect();
    let groups: Vec<Group> = group.lines().filter_map(parse_group).collect();
    let (user, own_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // A name that is a number is sought as a name first.
    let known = users
        .iter()
        .find(|known| known.name == user)
        .or_else(|| users.iter().find(|known| user.parse() == Ok(known.uid)));
    let mut identity = match known {
        Some(known) => {
            let member = |group: &&Group| group.members.contains(&known.name);
            Identity {
                uid: known.uid,
                gid: known.gid,
                // With a group of one's own choice the user's others do not count.
                groups: match own_group {
                    None => groups.iter().filter(member).map(|group| group.gid).collect(),
                    Some(_) => Vec::new(),
                },
                home: known.home.clone(),
            }
        }
        None => match user.parse() {
            Ok(uid) => Identity { uid, ..Identity::default() },
            Err(_) => {
                return Err(SetupError::setup(format!(
                    "unable to find user {user}: no matching entries in passwd file"
                )));
            }
        },
    };
    let find_group = |name: &str| {
        groups
            .iter()
            .find(|group| group.name == name)
            .map(|group| group.gid)
            .or_else(|| name.parse().ok())
            .ok_or_else(|| {
                SetupError::setup(format!(
                    "unable to find group {name}: no matching entries in group file"
                ))
            })
    };
    if let Some(name) = own_group {
        identity.gid = find_group(name)?;
    }
    for name in extra {
        identity.groups.push(find_group(name)?);
    }
    identity.groups.sort_unstable();
    identity.groups.dedup();
    if identity.home.is_empty() {
        identity.home = "/".to_owned();
    }
    Ok(identity)
}

fn parse_user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    fields.next()?;
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    fields.next();
    let home = fields.next().unwrap_or_default().to_owned();
    Some(User { name, uid, gid, home })
}

fn parse_group(line: &str) -> Option<Group> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    fields.next()?;
    let gid = fields.next()?.parse().ok()?;
    let members = fields.next().unwrap_or_default().split(',').map(str::to_owned).collect();
    Some(Group { name, gid, members })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:1:1::/:\napp:x:1000:1001:App:/home/app:/bin/sh\n77:x:500:500::/odd:\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,app\nvideo:x:44:app\napp:x:1001:\n";

    fn ids(user: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        resolve_in(PASSWD, GROUP, user, &[])
            .map(|id| (id.uid, id.gid, id.groups, id.home))
            .map_err(|error| error.message)
    }

    #[test]
    fn users_and_groups_are_found_as_other_engines_find_them() {
        let own = |text: &str| text.to_owned();
        assert_eq!(ids(""), Ok((0, 0, vec![10], own("/root"))));
        assert_eq!(ids("app"), Ok((1000, 1001, vec![10, 44], own("/home/app"))));
        assert_eq!(ids("1000"), Ok((1000, 1001, vec![10, 44], own("/home/app"))));
        assert_eq!(ids("app:video"), Ok((1000, 44, vec![], own("/home/app"))));
        assert_eq!(ids("1000:77"), Ok((1000, 77, vec![], own("/home/app"))));
        assert_eq!(ids("4242"), Ok((4242, 0, vec![], own("/"))));
        assert_eq!(ids("4242:wheel"), Ok((4242, 10, vec![], own("/"))));
        assert_eq!(ids("77"), Ok((500, 500, vec![], own("/odd"))));
        assert_eq!(ids("4294967295").map(|id| id.0), Ok(u32::MAX));
    }

    #[test]
    fn names_that_are_not_there_are_named() {
        assert!(ids("nobody").unwrap_err().contains("unable to find user nobody"));
        assert!(ids("app:none").unwrap_err().contains("unable to find group none"));
        assert!(ids("-1").is_err());
        assert!(ids("4294967296").is_err());
        let extra = ["video".to_owned(), "9".to_owned()];
        assert_eq!(resolve_in(PASSWD, GROUP, "0:0", &extra).unwrap().groups, [9, 44]);
    }
}
