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

/// Largest id that container engines take. Beyond it lies `u32::MAX`, which the kernel's calls read
/// as "leave it as it is": a process with that user would stay root.
const MAX_ID: u32 = i32::MAX as u32;

/// Resolves `USER[:GROUP]`, each by name or number, as container engines do. A number is always an
/// id, also where the image has a user of that name, and is taken as it is, with group 0, where the
/// image does not know it.
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
    let number = number_of(user)?;
    let known = users.iter().find(|known| match number {
        Some(uid) => known.uid == uid,
        None => known.name == user,
    });
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
        None => match number {
            Some(uid) => Identity { uid, ..Identity::default() },
            None => {
                return Err(SetupError::setup(format!(
                    "unable to find user {user}: no matching entries in passwd file"
                )));
            }
        },
    };
    let find_group = |name: &str| match number_of(name)? {
        Some(gid) => Ok(gid),
        None => {
            groups.iter().find(|group| group.name == name).map(|group| group.gid).ok_or_else(|| {
                SetupError::setup(format!(
                    "unable to find group {name}: no matching entries in group file"
                ))
            })
        }
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

/// The id that a text stands for, or `None` where it is a name.
fn number_of(text: &str) -> Result<Option<u32>, SetupError> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse() {
        Ok(id) if id <= MAX_ID => Ok(Some(id)),
        _ => Err(SetupError::setup(format!("{text}: uids and gids must be in range 0-{MAX_ID}"))),
    }
}

fn parse_id(field: &str) -> Option<u32> {
    field.parse().ok().filter(|id| *id <= MAX_ID)
}

fn parse_user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    fields.next()?;
    let uid = parse_id(fields.next()?)?;
    let gid = parse_id(fields.next()?)?;
    fields.next();
    let home = fields.next().unwrap_or_default().to_owned();
    Some(User { name, uid, gid, home })
}

fn parse_group(line: &str) -> Option<Group> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    fields.next()?;
    let gid = parse_id(fields.next()?)?;
    let members = fields.next().unwrap_or_default().split(',').map(str::to_owned).collect();
    Some(Group { name, gid, members })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        // There is a user of this name, with another uid.
        assert_eq!(ids("77"), Ok((77, 0, vec![], own("/"))));
        assert_eq!(ids("500"), Ok((500, 500, vec![], own("/odd"))));
        assert_eq!(ids("2147483647").map(|id| id.0), Ok(2_147_483_647));
    }

    #[test]
    fn names_that_are_not_there_are_named() {
        assert!(ids("nobody").unwrap_err().contains("unable to find user nobody"));
        assert!(ids("app:none").unwrap_err().contains("unable to find group none"));
        let extra = ["video".to_owned(), "9".to_owned()];
        assert_eq!(resolve_in(PASSWD, GROUP, "0:0", &extra).unwrap().groups, [9, 44]);
    }
    /// docs/hostile.md 18 and 20: the kernel reads 2^32 - 1 as "unchanged", which is root.
    #[test]
    fn hostile_18_ids_that_would_leave_the_process_root_are_refused() {
        let range = "uids and gids must be in range 0-2147483647";
        for user in ["4294967295", "4294967296", "2147483648", "-1", "99999999999999999999"] {
            for spec in [user.to_owned(), format!("app:{user}")] {
                let error = ids(&spec).unwrap_err();
                assert!(error.ends_with(range), "{spec}: {error}");
            }
            assert!(resolve_in(PASSWD, GROUP, "app", &[user.to_owned()]).is_err(), "{user}");
        }
        let passwd = "evil:x:4294967295:4294967295::/:\nalso:x:1:4294967295::/:\n";
        let group = "evil:x:4294967295:app\n";
        assert!(resolve_in(passwd, group, "evil", &[]).is_err());
        assert!(resolve_in(passwd, group, "also", &[]).is_err());
        assert!(resolve_in(PASSWD, group, "app:evil", &[]).is_err());
        assert_eq!(resolve_in(PASSWD, group, "app", &[]).unwrap().groups, [] as [u32; 0]);
    }

    proptest! {
        /// docs/hostile.md 20: the image's files may hold anything. Whoever is found has ids that mean what
        /// they say, and a number is that user.
        #[test]
        fn hostile_20_any_passwd_gives_ids_in_range(
            passwd in "([a-c]|:|0|4294967295|-1|1000|\n|.){0,60}",
            group in "([a-c]|:|,|7|4294967295|\n){0,60}",
            user in "([a-c]|:|0|1000|2147483647|4294967295|-|\\+){0,4}",
        ) {
            if let Ok(found) = resolve_in(&passwd, &group, &user, &["7".to_owned()]) {
                let ids = [&[found.uid, found.gid][..], &found.groups].concat();
                prop_assert!(ids.iter().all(|id| *id <= MAX_ID));
                prop_assert!(found.groups.contains(&7) && !found.home.is_empty());
                let name = user.split(':').next().unwrap_or_default();
                if let Ok(number) = name.parse::<u32>() {
                    prop_assert_eq!(found.uid, number);
                }
            }
        }
    }
}
